"""Visual pruners in stock vLLM: subclasses of its LLaVA family, chosen by configuration, through its own registry."""
