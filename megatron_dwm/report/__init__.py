"""Tables and plots of a run, from its files; never imports torch."""
