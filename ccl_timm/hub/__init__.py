"""Trained models leave the house: exports, pushes to the Hugging Face Hub, and their cards."""
