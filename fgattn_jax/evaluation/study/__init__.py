"""The study: what can be skipped on a trained model, when, and what it costs (`fgattn study`)."""
