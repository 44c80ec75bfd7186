"""Training: manifest rows -> groups of one volume -> optimizer steps -> checkpoints that resume to the bit."""
