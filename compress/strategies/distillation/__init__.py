"""Knowledge distillation, and plain training beside it."""
