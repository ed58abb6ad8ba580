//go:build !linux

package remotes

import "io"

func pipeOf(io.Writer) any { return nil }

func widen(any) {}
