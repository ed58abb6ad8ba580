// Package layer reads layers: the tar archives of the image specification's "Image Layer Filesystem Changeset". It
// serves the packages that apply layers (archive, erofs), index them (layer/index) or merge them in memory
// (layer/tree). It knows what names, whiteouts and PAX records mean, but does not touch a file system.
//
// A [Reader] reads a layer as it comes from a registry or the store, plain or compressed with gzip or zstd. Next yields
// the entries and Read their contents, while goroutines decompress and hash ahead. End reads the rest and checks the
// diff ID: what was made of the entries must not be used before End has succeeded. A [Plain] reads entries from the
// plain archive of a layer that was verified before, and skips their contents. [Clean], [Split], [Xattrs] and
// [LinkTarget] interpret the fields of an entry.
//
// Layers are hostile. Lengths of paths, bytes, holes of sparse files and memory for decompression are bounded. Error
// classes: DataLoss for a layer that is corrupt, ends too early or has another diff ID; InvalidArgument for an entry
// that no layer may have; FailedPrecondition for an exceeded limit; NotImplemented for a compression that is not
// supported. Errors of the caller's reader keep their class.
package layer

import (
	"distkit/errclass"

	"github.com/containerd/errdefs"
)

func dataLoss(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrDataLoss, format, a...)
}

func refused(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrInvalidArgument, format, a...)
}

// tooMuch returns the error for a layer that exceeds a limit set by the caller.
func tooMuch(format string, a ...any) error {
	return errclass.Errorf(errdefs.ErrFailedPrecondition, format, a...)
}
