"""Quality of placements: held-out loss, divergence from the teacher, and recall tasks."""
