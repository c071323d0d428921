"""From functions to compiled programs under way."""
