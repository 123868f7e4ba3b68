"""What the small data sets share that are made here, of images that other packages ship, with a trained model each."""
