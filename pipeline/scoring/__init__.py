"""Numbers about models and images: likelihood, features and distances, reconstruction, results and plots."""
