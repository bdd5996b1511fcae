"""Recurrent depth on generated reasoning tasks, differentiated in four ways."""
