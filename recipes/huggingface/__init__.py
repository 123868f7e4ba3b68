"""What recipes need of transformers and datasets: images, models, and the Trainer's arguments."""
