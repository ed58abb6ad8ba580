package archive

import (
	"io"

	"github.com/klauspost/compress/gzip"
)

// newGzip reads the members of a gzip stream, one after another to the end of r.
func newGzip(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) }
