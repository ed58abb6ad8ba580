package remotes

import (
	"io"
	"io/fs"
	"syscall"

	"golang.org/x/sys/unix"
)

// osFile is an *os.File, or what has one.
type osFile interface {
	Stat() (fs.FileInfo, error)
	SyscallConn() (syscall.RawConn, error)
}

// pipeOf returns what is behind w if that is a pipe, else nil.
func pipeOf(w io.Writer) osFile {
	f, ok := w.(osFile)
	if !ok {
		return nil
	}
	if fi, err := f.Stat(); err != nil || fi.Mode()&fs.ModeNamedPipe == 0 {
		return nil
	}
	return f
}

// widen lets a pipe hold a whole piece, where it may: each time that it is full costs both sides a turn.
func widen(pipe osFile) {
	c, err := pipe.SyscallConn()
	if err != nil {
		return
	}
	_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pieceSize) })
}
