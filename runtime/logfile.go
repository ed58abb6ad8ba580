package runtime

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"
)

// logRoom is the size of a log that is put aside, unless the container says otherwise.
const logRoom = 16 << 20

// logWriter writes what a process prints to its log, in the form of Kubernetes': a line has a
// time, the stream, F or P (a piece, whose line goes on), and the bytes. The log before stays
// as log.1; together they take at most twice the limit.
type logWriter struct {
	place place
	limit int64

	mu   sync.Mutex
	file *os.File
	size int64
	buf  []byte
}

func openLog(p place, limit int64) *logWriter {
	if limit <= 0 {
		limit = logRoom
	}
	return &logWriter{place: p, limit: limit}
}

// pieceRoom is how much of a line is written at once.
const pieceRoom = 16 << 10

// write appends what a stream has brought. It fails silently: a full disk must not stop the
// process whose output it is.
func (l *logWriter) write(stream string, p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now().UTC()
	for len(p) > 0 {
		l.buf = l.buf[:0]
		for len(p) > 0 && len(l.buf) < pieceRoom {
			line, tag := p, byte('P')
			if i := bytes.IndexByte(p, '\n'); i >= 0 {
				line, tag = p[:i], 'F'
			}
			if len(line) > pieceRoom {
				line, tag = line[:pieceRoom], 'P'
			}
			p = p[len(line):]
			if tag == 'F' {
				p = p[1:]
			}
			l.buf = now.AppendFormat(l.buf, time.RFC3339Nano)
			l.buf = append(append(append(l.buf, ' '), stream...), ' ', tag, ' ')
			l.buf = append(append(l.buf, line...), '\n')
		}
		l.flush()
	}
}

func (l *logWriter) flush() {
	tree, name := l.place.store, l.place.file("log")
	if l.file != nil && l.size > 0 && l.size+int64(len(l.buf)) > l.limit {
		_ = l.file.Close()
		l.file = nil
		_ = tree.Rename(name, name+".1")
	}
	if l.file == nil {
		f, err := tree.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return
		}
		l.file = f
		if l.size, err = f.Seek(0, io.SeekEnd); err != nil {
			l.size = 0
		}
		l.mend()
	}
	n, err := l.file.Write(l.buf)
	if err != nil && n > 0 {
		_ = l.file.Truncate(l.size) // no half a line
		n = 0
	}
	l.size += int64(n)
}

// mend ends a line that a killed writer left torn.
func (l *logWriter) mend() {
	if l.size == 0 {
		return
	}
	r, err := l.place.store.Open(l.place.file("log"))
	if err != nil {
		return
	}
	defer r.Close()
	last := make([]byte, 1)
	if _, err := r.ReadAt(last, l.size-1); err == nil && last[0] != '\n' {
		if _, err := l.file.Write([]byte{'\n'}); err == nil {
			l.size++
		}
	}
}

func (l *logWriter) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.file.Close()
		l.file = nil
	}
}

// Entry is a piece of what a process printed.
type Entry struct {
	Time   time.Time
	Stream string // stdout or stderr
	Text   []byte // with its newline, where the line ends
}

// parseEntry reads a line of a log.
func parseEntry(line []byte) (e Entry, ok bool) {
	at, rest, _ := bytes.Cut(line, []byte{' '})
	stream, rest, _ := bytes.Cut(rest, []byte{' '})
	tag, text, found := bytes.Cut(rest, []byte{' '})
	t, err := time.Parse(time.RFC3339Nano, string(at))
	if err != nil || !found || len(text) == 0 || text[len(text)-1] != '\n' {
		return Entry{}, false
	}
	e = Entry{t, string(stream), text}
	switch string(tag) {
	case "F":
	case "P":
		e.Text = text[:len(text)-1]
	default:
		return Entry{}, false
	}
	return e, e.Stream == "stdout" || e.Stream == "stderr"
}

// logReader reads a log from an end that moves, through rotations.
type logReader struct {
	place place
	files []*os.File // still to be read, the oldest first
	part  []byte
}

// openReader reads a log from its beginning, or from where it ends now.
func openReader(p place, fromEnd bool) (*logReader, error) {
	r := &logReader{place: p}
	if err := r.find(); err != nil {
		return nil, err
	}
	if !fromEnd {
		return r, nil
	}
	for len(r.files) > 1 {
		_ = r.files[0].Close()
		r.files = r.files[1:]
	}
	if len(r.files) == 1 {
		if _, err := r.files[0].Seek(0, io.SeekEnd); err != nil {
			r.close()
			return nil, err
		}
	}
	return r, nil
}

// find adds the files that are new.
func (r *logReader) find() error {
	var found []*os.File
	for tries := 0; ; tries++ {
		found = found[:0]
		for _, name := range []string{"log.1", "log"} {
			f, err := r.place.store.Open(r.place.file(name))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				closeFiles(found)
				return err
			}
			found = append(found, f)
		}
		if len(found) < 2 || !sameFile(found[0], found[1]) || tries > 10 {
			break
		}
		closeFiles(found) // it was put aside in between
	}
	if n := len(r.files); n > 0 {
		for i, f := range found {
			if sameFile(f, r.files[n-1]) {
				closeFiles(found[:i+1])
				found = found[i+1:]
				break
			}
		}
	}
	r.files = append(r.files, found...)
	return nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

func sameFile(a, b *os.File) bool {
	x, err := a.Stat()
	if err != nil {
		return false
	}
	y, err := b.Stat()
	return err == nil && os.SameFile(x, y)
}

func (r *logReader) close() { closeFiles(r.files) }

// read calls f with what is new.
func (r *logReader) read(f func(Entry) error) error {
	if err := r.find(); err != nil {
		return err
	}
	for len(r.files) > 0 {
		in := bufio.NewReaderSize(r.files[0], 64<<10)
		for {
			piece, err := in.ReadSlice('\n')
			r.part = append(r.part, piece...)
			if errors.Is(err, bufio.ErrBufferFull) && len(r.part) < maxFile {
				continue
			}
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
				return err
			}
			line := r.part
			r.part = nil
			if e, ok := parseEntry(line); ok {
				if err := f(e); err != nil {
					return err
				}
			}
		}
		if len(r.files) == 1 {
			return nil
		}
		_ = r.files[0].Close()
		r.files, r.part = r.files[1:], nil
	}
	return nil
}

// follow calls f with all that comes until done says that nothing comes any more.
func (r *logReader) follow(ctx context.Context, w *watcher, done func() (bool, error), f func(Entry) error) error {
	for {
		over, err := done() // before the last read
		if err != nil {
			return err
		}
		if err := r.read(f); err != nil || over {
			return err
		}
		if err := w.wait(ctx, time.Second); err != nil {
			return err
		}
	}
}
