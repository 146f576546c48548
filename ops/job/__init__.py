"""A job file and what it becomes, before a cent is spent."""
