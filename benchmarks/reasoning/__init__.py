"""Recurrent depth on generated reasoning tasks, trained in four ways."""
