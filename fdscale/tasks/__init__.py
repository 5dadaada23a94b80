"""What fine-tuning trains on top of a backbone, and how each kind of it is judged."""
