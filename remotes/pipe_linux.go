package remotes

import (
	"io"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// pipeOf returns what is behind w if that is a pipe, else nil.
func pipeOf(w io.Writer) *os.File {
	f, ok := w.(*os.File)
	if !ok {
		return nil
	}
	if fi, err := f.Stat(); err != nil || fi.Mode()&fs.ModeNamedPipe == 0 {
		return nil
	}
	return f
}

// widen lets a pipe hold a whole piece, where it may: each time that it is full costs both sides a turn.
func widen(pipe *os.File) {
	c, err := pipe.SyscallConn()
	if err != nil {
		return
	}
	_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pieceSize) })
}
