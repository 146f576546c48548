"""vast.ai and dollars: the client, its records, ranking, cost."""
