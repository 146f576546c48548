"""What one does with a result: merge, evaluate, talk, export, combine."""
