package stdio

import (
	"errors"
	"io"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

const (
	relayRoom = 256 << 10       // the size of pipes; the pipes of a user may have 64 MiB together
	wary      = 64 << 10        // how many bytes a process must have read before input is moved ahead of its reads
	checkEach = time.Second / 2 // how often a background job checks whether it has come to the foreground
)

// errStopped is the error of a flow whose latch is closed.
var errStopped = errors.New("stopped")

// flow moves bytes from one descriptor to another, with splice(2) if the kernel supports it for both. One of the two is
// a pipe of ours. The flags of the other are not changed, since other processes share them.
type flow struct {
	from, to int
	offset   *int64 // position in from, if from is a file
	input    bool   // to is a process's input
	waits    bool   // poll before moving, because a read of from may block or to may be full
	stop     *latch

	done chan struct{} // closed when deliver has returned
	err  error         // the error of deliver
	cut  bool          // bytes were read but could not be written

	copies bool // the kernel can't splice these, so copy
	buf    []byte
}

// deliver moves a process's output. If the output can't be written, the process gets a broken pipe.
func (f *flow) deliver() {
	f.err = f.run()
	_ = unix.Close(f.from)
	close(f.done)
}

// run moves everything until from ends. When the latch is closed, an input stops with errStopped, and an output moves
// what the pipe holds at that time. The error is EPIPE if the reader is gone.
func (f *flow) run() error {
	left := -1 // no limit
	for {
		if f.stop.isClosed() {
			if f.input {
				return errStopped
			}
			if left < 0 {
				var err error
				if left, err = queued(f.from); err != nil {
					return err
				}
			}
			if left == 0 {
				return nil
			}
		}
		var n int
		var err error
		if f.waits {
			err = f.wait()
		}
		if err == nil {
			n, err = f.move(left)
		}
		if err == unix.EAGAIN {
			if err = f.wait(); err == nil {
				continue
			}
		}
		switch {
		case err == unix.EINTR:
		case err == io.EOF:
			return nil
		case err == unix.EINVAL && !f.copies:
			f.copies, f.buf = true, make([]byte, 64<<10)
		case err != nil:
			return err
		case n == 0:
			return nil
		case left > 0:
			left -= min(n, left)
		}
	}
}

// move moves some bytes, at most limit if that is not negative.
func (f *flow) move(limit int) (n int, err error) {
	room := 1 << 20
	if limit >= 0 {
		room = min(room, limit)
	}
	if !f.copies {
		n, err := unix.Splice(f.from, f.offset, f.to, nil, room, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
		if err != nil && err != unix.EAGAIN && err != unix.EINTR && err != unix.EINVAL {
			f.cut = true
		}
		return int(n), err
	}
	if f.offset != nil {
		if n, err = unix.Pread(f.from, f.buf, *f.offset); n > 0 {
			*f.offset += int64(n)
		}
	} else {
		n, err = unix.Read(f.from, f.buf[:min(room, len(f.buf))])
	}
	if err != nil || n == 0 {
		return max(n, 0), err
	}
	if err := f.write(f.buf[:n]); err != nil {
		f.cut = true
		return 0, err
	}
	return n, nil
}

// write writes all of b, even to a non-blocking descriptor.
func (f *flow) write(b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(f.to, b)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if err := f.room(); err != nil {
				return err
			}
		case err != nil:
			return err
		default:
			b = b[n:]
		}
	}
	return nil
}

// wait waits until there are bytes to move and room for them, or until the latch is closed. The error is io.EOF if no
// more bytes can come, and EPIPE if the reader is gone while there are none.
func (f *flow) wait() error {
	fds := []unix.PollFd{readable(f.from), {Fd: int32(f.to)}}
	if f.input || !f.stop.isClosed() {
		fds = append(fds, readable(f.stop.fd))
	}
	fds, err := poll(always, fds...)
	if err != nil {
		return err
	}
	switch from := fds[0].Revents; {
	case f.input && fds[2].Revents != 0:
		return errStopped
	case from&unix.POLLIN != 0 && f.waits && !f.input:
		return nil // to may be open read-only, which is never writable; moving will fail then
	case from&unix.POLLIN != 0:
		return f.room()
	case from&unix.POLLHUP != 0:
		return io.EOF
	case fds[1].Revents&(unix.POLLERR|unix.POLLHUP) != 0:
		return unix.EPIPE
	}
	return nil
}

// room waits until the reader has made room.
func (f *flow) room() error {
	fds := []unix.PollFd{writable(f.to)}
	if f.input {
		fds = append(fds, readable(f.stop.fd))
	}
	fds, err := poll(always, fds...)
	if err == nil && f.input && fds[1].Revents != 0 {
		err = errStopped
	}
	return err
}

// step moves a pipe's bytes to the process's input, but leaves bytes that the process does not read to the pipe's next
// reader, as in `producer | while read -r line; do run …; done`. It offers the process one page at a time, and takes
// the page from the pipe after the process has read it. It returns true once the process has read so much that it will
// read everything.
func (f *flow) step() (eager bool, err error) {
	const page = 4096
	null, err := unix.Open(os.DevNull, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(null)
	// With room for one page only, a pipe is writable when that page has been read.
	if _, err := unix.FcntlInt(uintptr(f.to), unix.F_SETPIPE_SZ, page); err != nil {
		return true, nil
	}
	for taken := 0; taken < wary; {
		if err := f.wait(); err != nil {
			return false, err
		}
		n, err := unix.Tee(f.from, f.to, page, unix.SPLICE_F_NONBLOCK)
		switch {
		case err == unix.EAGAIN, err == unix.EINTR:
			continue
		case err != nil:
			return false, err
		case n == 0:
			return false, nil
		}
		fds, err := poll(always, writable(f.to), readable(f.stop.fd))
		if err != nil {
			return false, err
		}
		over := fds[1].Revents != 0 || fds[0].Revents&unix.POLLERR != 0
		unread := 0
		if over {
			if unread, err = queued(f.to); err != nil {
				return false, err
			}
		}
		for read := int(n) - unread; read > 0; {
			n, err := unix.Splice(f.from, nil, null, nil, read, unix.SPLICE_F_NONBLOCK)
			if err == unix.EINTR {
				continue
			}
			if err != nil || n == 0 {
				break // another reader has taken it
			}
			read -= int(n)
		}
		if over {
			return false, errStopped
		}
		taken += int(n)
	}
	_, _ = unix.FcntlInt(uintptr(f.to), unix.F_SETPIPE_SZ, relayRoom)
	return true, nil
}

// typed moves what is typed on a terminal while this process's job is in the foreground. Reading in the background
// would stop the job, although its process may never read.
func (f *flow) typed() error {
	signal.Ignore(unix.SIGTTIN)
	defer signal.Reset(unix.SIGTTIN)
	b := make([]byte, 4096)
	for {
		if !inForeground(f.from) {
			fds, err := poll(checkEach, unix.PollFd{Fd: int32(f.to)}, readable(f.stop.fd))
			switch {
			case err != nil:
				return err
			case fds[0].Revents != 0, fds[1].Revents != 0:
				return errStopped
			}
			continue
		}
		if err := f.wait(); err != nil {
			return err
		}
		n, err := unix.Read(f.from, b)
		switch {
		case err == unix.EINTR, err == unix.EAGAIN:
		case err == unix.EIO && !inForeground(f.from):
		case err == unix.EIO:
			return nil // the terminal has hung up
		case err != nil:
			return err
		case n == 0:
			return nil
		default:
			if err := f.write(b[:n]); err != nil {
				return err
			}
		}
	}
}

// inForeground reports whether this process may read from a terminal without being stopped. It may if it is in the
// foreground, or if the terminal does not control its session.
func inForeground(fd int) bool {
	group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err != nil || group == unix.Getpgrp()
}
