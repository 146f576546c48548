"""What one does with rows before a job: check, pick, translate, make more of them."""
