"""Reading an adapter: files are checked before they are believed, and a load that fails changes nothing."""
