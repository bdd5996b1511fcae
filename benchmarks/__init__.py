"""Training scripts and measurements. A package only so that tests can import it."""
