"""Scores of models and images: likelihood, features and distances, reconstruction, results and plots."""
