// Package erofs makes file systems of layers, as files: EROFS images, which Linux mounts read-only from a file or a
// block device, ext4 file systems, and tar archives. It needs no privileges, since owners, devices and attributes are
// only bytes in a file. The same layers give the same bytes.
//
// A [Builder] applies layers to a tree in memory ([Builder.Add]), as package archive applies them to a directory, and
// then writes the merged tree with [Builder.Write], [Builder.WriteExt4] or [Builder.WriteTar].
//
// There are two kinds of EROFS images. A complete image holds the data of all files, in blocks of 4096 bytes. An index
// holds metadata only, in blocks of 512 bytes like those of a tar archive. The data of its files are ranges of the
// layers' plain archives, which the kernel is given as further devices when it mounts the index. [Store] keeps such a
// plain archive with its diff ID, and [Open] returns it as a [Layer]. [Seal] records outside of the store that an
// archive was verified, so that mounting it again need not hash it again. The format is described in the kernel's
// Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h.
//
// Layers are untrusted. Bytes, entries and memory are bounded by [Options]. What a file system can't hold is left out
// and counted by [Builder.Unset], or refused with Options.Strict. Error classes: DataLoss for a corrupt layer or
// another diff ID, InvalidArgument for an entry that no layer may have, FailedPrecondition for an exceeded limit,
// NotImplemented for a compression or whiteout that is not supported.
//
// Why not other writers: mke2fs of e2fsprogs 1.47.2, tried for ext4, takes from an archive no attributes but
// security.capability and no nanoseconds, and versions before 1.47.1 read no archives. github.com/erofs/go-erofs v0.3.1
// has no hard links, accepts only names that are UTF-8, silently cuts long extended attributes, needs an output that
// can seek, uses 1 KB of memory a file, and its merge lets a whiteout delete what the same layer added.
package erofs
