package image

// Watched is a Listing that knows whether it is still what the store has.
type Watched struct {
	Listing
	from *markedNames
}

// Watch returns the names as they are now. The caller closes it.
func (n *Names) Watch() (*Watched, error) {
	m, ix, err := openMarked(n)
	if err != nil {
		return nil, err
	}
	m.entries = nil // these are for a sweep
	return &Watched{Listing{index: ix}, m}, nil
}

// Current reports whether no name has changed since.
func (w *Watched) Current() bool { return w.from.file != nil && w.from.current() }

// Close forgets the file that the names are from.
func (w *Watched) Close() {
	if w.from.file != nil {
		_ = w.from.file.Close()
	}
}
