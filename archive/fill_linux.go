package archive

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"

	"distkit/disk/sys"
	"distkit/layer"

	"golang.org/x/sys/unix"
)

// A batch is a number of small files for a worker.
type batch struct {
	data  []byte
	files []pending
}

type pending struct {
	file
	from, to int // of its content in the batch's data
}

// queueSmall reads the content of a small file and queues the file for a worker.
func (a *applier) queueSmall(f file, size int) error {
	if a.batch != nil && (len(a.batch.data)+size > batchBytes || len(a.batch.files) == batchFiles) {
		a.send()
	}
	if a.batch == nil {
		a.batch = <-a.spare
		if a.batch.data == nil {
			a.batch.data = make([]byte, 0, batchBytes)
		}
	}
	b := a.batch
	from := len(b.data)
	b.data = b.data[:from+size]
	b.files = append(b.files, pending{f, from, from + size})
	if _, err := io.ReadFull(a.in, b.data[from:]); err != nil {
		return err
	}
	return nil
}

func (a *applier) send() {
	a.work <- a.batch
	a.batch = nil
}

// worker is the loop of a goroutine that writes small files. After an error of the layer it only closes them.
func (a *applier) worker() {
	for b := range a.work {
		for i := range b.files {
			p := &b.files[i]
			if a.ctx.Err() != nil {
				_ = unix.Close(p.fd)
				continue
			}
			err := writeAll(p.fd, b.data[p.from:p.to])
			if err != nil {
				_ = unix.Close(p.fd)
			} else {
				err = a.complete(&p.file)
			}
			if err != nil {
				a.fail(fmt.Errorf("entry %s: %w", quote(p.name), err))
			}
		}
		clear(b.files)
		b.data, b.files = b.data[:0], b.files[:0]
		a.spare <- b
	}
}

func (a *applier) fail(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.failed == nil {
		a.failed = err
		a.cancel(err)
	}
}

func (a *applier) workerErr() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.failed
}

// copyLarge copies an entry's content to a file. It leaves holes in a sparse file.
func (a *applier) copyLarge(h *tar.Header, fd int) error {
	holes := layer.Sparse(h)
	if holes { // fails early if the file system can't have a file of this size
		if err := sys.Ftruncate(fd, h.Size); err != nil {
			return err
		}
	}
	var offset int64
	for {
		b, err := a.next()
		n := len(b)
		if holes {
			if werr := writeSparse(fd, b, offset); werr != nil {
				return werr
			}
		} else if werr := writeAll(fd, b); werr != nil {
			return werr
		}
		offset += int64(n)
		if err == io.EOF && offset == h.Size {
			return nil
		}
		if err == io.EOF {
			err = dataLoss("layer ends too early, after %d bytes", a.in.Offset())
		}
		if err != nil {
			return err
		}
	}
}

// next returns the next bytes of an entry's content. At the end it returns io.EOF, possibly with the last bytes.
func (a *applier) next() ([]byte, error) {
	if err := a.ctx.Err(); err != nil {
		return nil, err
	}
	n, err := 0, error(nil)
	for m := 0; n < len(a.buffer) && err == nil; n += m {
		m, err = a.in.Read(a.buffer[n:])
	}
	return a.buffer[:n], err
}

var zeros [4096]byte

func writeSparse(fd int, b []byte, at int64) error {
	for len(b) > 0 {
		n := min(len(b), len(zeros))
		if !bytes.Equal(b[:n], zeros[:n]) {
			for done := 0; done < n; {
				m, err := unix.Pwrite(fd, b[done:n], at+int64(done))
				if err != nil && !errors.Is(err, unix.EINTR) {
					return err
				}
				done += max(m, 0)
			}
		}
		b, at = b[n:], at+int64(n)
	}
	return nil
}

func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		b = b[max(n, 0):]
	}
	return nil
}

// complete sets the attributes of a file that has its content, and closes it.
func (a *applier) complete(f *file) error {
	err := a.attributes(f)
	if err == nil {
		if err = futimens(f.fd, &f.times); err != nil {
			err = fmt.Errorf("set times: %w", err)
		}
	}
	if cerr := unix.Close(f.fd); cerr != nil && err == nil {
		err = cerr
	}
	return err
}
