// Compress is gzip and zstd as the image builders need them: standard input to standard
// output, the same bytes on every machine.
package main

import (
	"compress/gzip"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "compress:", err)
		os.Exit(1)
	}
}

func run() error {
	var w io.WriteCloser
	switch {
	case len(os.Args) == 2 && os.Args[1] == "gzip":
		w = gzip.NewWriter(os.Stdout)
	case len(os.Args) == 2 && os.Args[1] == "zstd":
		var err error
		if w, err = zstd.NewWriter(os.Stdout, zstd.WithEncoderConcurrency(1)); err != nil {
			return err
		}
	default:
		return fmt.Errorf("usage: compress gzip|zstd")
	}
	if _, err := io.Copy(w, os.Stdin); err != nil {
		return err
	}
	return w.Close()
}
