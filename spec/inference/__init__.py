"""What a finished run's network says: of a split, of pictures."""
