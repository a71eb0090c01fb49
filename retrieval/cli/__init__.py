"""Commands over document indexes."""
