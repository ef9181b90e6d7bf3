"""What is routing over LoRAs worth that come separately? The measurement, on a small pretrained model."""
