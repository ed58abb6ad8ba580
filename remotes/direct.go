package remotes

import (
	"context"
	"io"
	"io/fs"
	"net"
	"net/http/httptrace"
	"os"
)

// direct is a connection without TLS. What is read from it can go to a pipe inside the kernel, so
// that what nobody here looks at is not copied: net/http reads, counts and ends as ever, but its
// buffer stays as it was.
type direct struct {
	*net.TCPConn
	pipe *os.File // nil: read as usual
	left int64    // bytes that may go there: what follows a body is the next reply's
	sent int64
}

func (c *direct) Read(p []byte) (int, error) {
	if c.pipe == nil || c.left == 0 {
		return c.TCPConn.Read(p)
	}
	n, err := splice(c.TCPConn, c.pipe, int(min(int64(len(p)), c.left)))
	if err != nil {
		// The end, and all that is wrong here or there, shows when it is done as usual.
		c.pipe = nil
		return c.TCPConn.Read(p)
	}
	c.left -= int64(n)
	c.sent += int64(n)
	return n, nil
}

// seen ends that before the body's end; after it nothing of it is left to go anywhere.
func (c *direct) seen() {
	if c != nil && c.left > 0 {
		c.pipe = nil
	}
}

func dialDirect(d *net.Dialer) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := d.DialContext(ctx, network, address)
		if tcp, ok := c.(*net.TCPConn); ok {
			return &direct{TCPConn: tcp}, err
		}
		return c, err
	}
}

// traceDirect tells the connection that a reply comes by, where it is a direct one.
func traceDirect(ctx context.Context, at **direct) context.Context {
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		*at, _ = i.Conn.(*direct)
	}})
}

// pipeOf is what is behind w if that is a pipe.
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

// writeTo passes the rest on to a pipe. It must not have been read from before.
func (d *download) writeTo(pipe *os.File) (total int64, err error) {
	buf := make([]byte, pipeRead)
	for {
		c, sent := d.direct, int64(0)
		if !d.past {
			c = nil
		}
		if c != nil {
			// Here, where the consumer's time does not count.
			waitWritable(d.ctx, pipe)
			c.pipe, c.left, sent = pipe, d.until-d.at, c.sent
		}
		n, rerr := d.Read(buf)
		if c == nil || c.sent == sent {
			if _, err := pipe.Write(buf[:n]); err != nil {
				return total, &writeError{err}
			}
		}
		total += int64(n)
		if rerr == io.EOF {
			return total, nil
		}
		if rerr != nil {
			return total, rerr
		}
	}
}
