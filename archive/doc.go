// Package archive turns layers into files, and files into layers.
//
// A layer is a tar archive, plain or compressed with gzip or zstd, in the form of "Image Layer Filesystem Changeset" in
// the image specification. [Apply] writes a layer into a directory and returns its diff ID, the digest of the
// uncompressed archive. [Diff] writes a layer that turns one directory into another. [ChainID] computes the ID of a
// stack of layers. Parsing tar is the task of package layer.
//
// Layers are hostile input. The invariant of Apply is that nothing outside the target is read, created or changed:
//
//   - Names are cleaned to relative paths.
//   - Each name is used as one component in a directory that is held open.
//   - A symbolic link that is part of a path is followed as if the target were the root of the file system.
//   - The kernel refuses everything else: openat2(2) with RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS, or O_NOFOLLOW for
//     each component where openat2 is missing.
//
// One goroutine processes the entries in order; workers only write the content of small files. Attributes that this
// user can't set are counted, or are an error with Strict.
//
// Errors have classes of github.com/containerd/errdefs: ErrDataLoss (corrupt or truncated layer, wrong diff ID),
// ErrInvalidArgument (an entry that no layer may have), ErrFailedPrecondition (a bound exceeded), ErrNotImplemented
// (not supported), ErrNotFound (a directory to compare is missing).
package archive
