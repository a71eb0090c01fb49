"""What commands of several plugins share."""

import typer


def extend(cli: typer.Typer, name: str, group: typer.Typer) -> None:
    """Add a group of commands; where one of that name is there already, its commands go into it."""
    for known in cli.registered_groups:
        if known.name == name and known.typer_instance is not None:
            known.typer_instance.registered_commands += group.registered_commands
            return
    cli.add_typer(typer.Typer(help=group.info.help, no_args_is_help=True), name=name)
    extend(cli, name, group)
