//go:build !linux && !darwin

package content

// bootID is unknown here: stored hash states are never believed, everything is hashed again.
func bootID() string { return "" }
