"""What a run did, as tables and pictures; reads the files of a run and never imports torch."""
