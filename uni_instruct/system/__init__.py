"""What the project asks of the operating system: files, processes, ports, downloads, terminals."""
