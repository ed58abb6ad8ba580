//go:build !linux

package main

// alive returns a function that reports whether a process still runs.
func alive(pid int) func() bool { return exists(pid) }
