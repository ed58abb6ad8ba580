//go:build !linux

package disk

func inLargePages([]byte) {}
