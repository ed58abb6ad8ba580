//go:build !linux

package main

// alive returns a function that reports whether the process is still running.
func alive(pid int) func() bool { return exists(pid) }
