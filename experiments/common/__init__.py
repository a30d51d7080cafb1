"""What several experiments share: how runs are started and kept, what is trained, and the tables."""
