"""What recipes need from transformers and datasets: images, models, and the Trainer's arguments."""
