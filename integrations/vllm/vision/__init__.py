"""Visual pruners in stock vLLM: subclasses of its LLaVA models, selected by model class overrides."""
