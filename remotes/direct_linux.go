package remotes

import (
	"context"
	"io"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// pipeRead is the most that goes at a time: as much as a pipe of an ordinary user's can hold.
const pipeRead = 1 << 20

// splice moves bytes and waits for the first of them; none where the pipe is full. Any error, and
// io.EOF, leaves all as it was.
func splice(from *net.TCPConn, to *os.File, most int) (n int, err error) {
	in, err := from.SyscallConn()
	if err != nil {
		return 0, err
	}
	out, err := to.SyscallConn()
	if err != nil {
		return 0, err
	}
	var serr error
	move := func(in, out int) (done bool) {
		for {
			var k int64
			k, serr = unix.Splice(in, nil, out, nil, most, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
			switch {
			case serr == unix.EINTR:
				continue
			case serr == unix.EAGAIN:
				// Which of the two it would have had to wait for is not told.
				_, _, perr := unix.Recvfrom(in, make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
				serr = nil
				return perr != unix.EAGAIN
			case serr == nil && k == 0:
				serr = io.EOF
			}
			n = max(int(k), 0)
			return true
		}
	}
	err = in.Read(func(in uintptr) (done bool) {
		if err := out.Control(func(out uintptr) { done = move(int(in), int(out)) }); err != nil {
			serr, done = err, true
		}
		return done
	})
	if err == nil {
		err = serr
	}
	return n, err
}

// widen lets a pipe hold as much as goes into it at a time, where it may: each time that it is full
// costs both sides a turn.
func widen(pipe *os.File) {
	c, err := pipe.SyscallConn()
	if err != nil {
		return
	}
	_ = c.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, pipeRead) })
}

// waitWritable waits until a pipe has room, or nobody reads it any more.
func waitWritable(ctx context.Context, pipe *os.File) {
	c, err := pipe.SyscallConn()
	if err != nil {
		return
	}
	_ = c.Control(func(fd uintptr) {
		for ctx.Err() == nil {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 1000)
			if n > 0 || err != nil && err != unix.EINTR {
				return
			}
		}
	})
}
