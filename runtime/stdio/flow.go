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
	relayRoom = 256 << 10       // the size of a pipe; a user's pipes have some 64 MiB in all
	wary      = 64 << 10        // how much a process must read before its input is moved ahead of its reads
	checkEach = time.Second / 2 // how often a background job looks whether it is in the foreground
)

// errStopped is the error of a flow whose latch was closed.
var errStopped = errors.New("stopped")

// flow moves bytes from one descriptor to another, by splice(2) where the kernel can. One of the two is a pipe of ours, and
// the flags of the other are not changed.
type flow struct {
	from, to int
	offset   *int64 // in from, if from is a file
	input    bool   // to is a process's input
	waits    bool   // for bytes before it moves any: a read of from may block, or to may refuse them
	stop     *latch

	done chan struct{} // closed when deliver has ended
	err  error         // the error of deliver
	cut  bool          // bytes were read and could not be written

	copies bool // the kernel can't splice from and to
	buf    []byte
}

// deliver moves a process's output. If it can't be written, the process gets a broken pipe.
func (f *flow) deliver() {
	f.err = f.run()
	_ = unix.Close(f.from)
	close(f.done)
}

// run moves everything until from ends. Once the latch is closed, an input returns errStopped, and an output moves what the
// pipe holds at that time. The error is EPIPE if the reader has gone away.
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

// write writes all bytes, also to a descriptor that does not block.
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

// wait waits until there are bytes and room for them, or until the latch is closed. The error is io.EOF if no bytes can come
// any more, and EPIPE if the reader went away while there were no bytes.
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
		return nil // to may be open for reading only, which is never writable: moving tells
	case from&unix.POLLIN != 0:
		return f.room()
	case from&unix.POLLHUP != 0:
		return io.EOF
	case fds[1].Revents&(unix.POLLERR|unix.POLLHUP) != 0:
		return unix.EPIPE
	}
	return nil
}

// room waits until the reader takes more.
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

// step moves a pipe's bytes, but leaves those that the process does not read to the next reader of the pipe, as in
// `producer | while read -r line; do run …; done`. It shows the process a page at a time, and takes the page from the pipe
// once the process has read it. It returns true if the process has read so much that it is one that reads everything.
func (f *flow) step() (eager bool, err error) {
	const page = 4096
	null, err := unix.Open(os.DevNull, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(null)
	// A pipe with room for one page is writable once the page was read.
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
				break // another process has taken it
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

// typed moves what is typed on a terminal while this process's job is in the foreground. A job in the background is not
// stopped for a read that its process may never ask for.
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
			return nil // the terminal was hung up
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

// inForeground reports whether this process may read from a terminal. It may if the terminal controls none of its jobs.
func inForeground(fd int) bool {
	group, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err != nil || group == unix.Getpgrp()
}
