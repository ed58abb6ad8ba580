package stdio

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"distkit/disk"
)

// defaultLimit is the size of a log that is put aside, unless the caller says otherwise.
const defaultLimit = 16 << 20

// PieceRoom is how much of a line is written at once.
const PieceRoom = 16 << 10

// Streams of a log's lines beside stdout and stderr. Readers that don't know them pass over them.
const (
	offsetStream = "offset" // the first line of a file: how many bytes of the log came before it
	lostStream   = "lost"   // how many bytes could not be written here
)

// Dir is the directory of a log.
type Dir struct {
	Tree disk.Tree
	Name string
}

func (d Dir) current() string { return filepath.Join(d.Name, "log") }

// Writer writes what a process prints to its log, in the form of Kubernetes': a line has a
// time, the stream, F or P (a piece, whose line goes on), and the bytes. The log before stays
// as log.1; together they take at most twice the limit.
type Writer struct {
	dir   Dir
	limit int64

	mu     sync.Mutex
	file   *os.File
	size   int64
	offset int64 // of the file in the whole log
	lost   int64 // what could not be written since
	buf    []byte
}

// NewWriter returns a writer of the log in a directory, which is made if it isn't there, so that it can be followed. What
// an earlier process has printed stays. A limit of 0 is 16 MiB.
func NewWriter(d Dir, limit int64) (*Writer, error) {
	if limit <= 0 {
		limit = defaultLimit
	}
	l := &Writer{dir: d, limit: limit}
	return l, l.open()
}

// Write appends what a stream has brought. A full disk does not stop the process whose output it is: what can't be
// written is counted, and told to readers once there is room.
func (l *Writer) Write(stream string, p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now().UTC()
	for len(p) > 0 {
		l.buf = l.buf[:0]
		for len(p) > 0 && len(l.buf) < PieceRoom {
			line, tag := p, byte('P')
			if i := bytes.IndexByte(p, '\n'); i >= 0 {
				line, tag = p[:i], 'F'
			}
			if len(line) > PieceRoom {
				line, tag = line[:PieceRoom], 'P'
			}
			p = p[len(line):]
			if tag == 'F' {
				p = p[1:]
			}
			l.buf = appendLine(l.buf, now, stream, tag, line)
		}
		l.flush(now)
	}
}

func appendLine(b []byte, now time.Time, stream string, tag byte, text []byte) []byte {
	b = now.AppendFormat(b, time.RFC3339Nano)
	b = append(append(append(b, ' '), stream...), ' ', tag, ' ')
	return append(append(b, text...), '\n')
}

// flush writes the buffer, into a new file if it has no room in this one.
func (l *Writer) flush(now time.Time) {
	if l.file != nil && l.size > 0 && l.size+int64(len(l.buf)) > l.limit {
		_ = l.file.Close()
		l.file = nil
		if l.dir.Tree.Rename(l.dir.current(), l.dir.current()+".1") == nil {
			l.offset += l.size
		}
	}
	if l.file == nil && l.open() != nil {
		l.lost += int64(len(l.buf))
		return
	}
	if l.lost > 0 {
		line := appendLine(nil, now, lostStream, 'F', strconv.AppendInt(nil, l.lost, 10))
		if l.append(line) != nil {
			l.lost += int64(len(l.buf))
			return
		}
		l.lost = 0
	}
	if l.append(l.buf) != nil {
		l.lost += int64(len(l.buf))
	}
}

// append writes whole lines to the file, or nothing.
func (l *Writer) append(b []byte) error {
	n, err := l.file.Write(b)
	if err != nil && n > 0 {
		_ = l.file.Truncate(l.size)
		n = 0
	}
	l.size += int64(n)
	return err
}

// open opens the current file, and ends a line that a killed writer left torn.
func (l *Writer) open() error {
	f, err := l.dir.Tree.OpenFile(l.dir.current(), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	if l.size, err = f.Seek(0, io.SeekEnd); err != nil {
		_ = f.Close()
		return err
	}
	l.file = f
	switch last := make([]byte, 1); {
	case l.size == 0:
		return l.append(appendLine(nil, time.Now().UTC(), offsetStream, 'F', strconv.AppendInt(nil, l.offset, 10)))
	default:
		first := make([]byte, 128)
		n, _ := f.ReadAt(first, 0)
		l.offset = max(0, offsetOf(first[:n]))
		if _, err := f.ReadAt(last, l.size-1); err == nil && last[0] != '\n' {
			return l.append([]byte{'\n'})
		}
	}
	return nil
}

// Begin marks the beginning of a run, after what an earlier one has printed. Readers pass over the line.
func (l *Writer) Begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.append(appendLine(nil, time.Now().UTC(), "begin", 'F', nil))
	}
}

// Close closes the file.
func (l *Writer) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.file.Close()
		l.file = nil
	}
}

// Entry is a piece of what a process printed.
type Entry struct {
	Stream string // stdout or stderr
	Text   []byte // with its newline, where the line ends; it changes after the call that it was handed to
	// Missing is the number of bytes of the log, if not 0, that can't be read at this place. Such an entry has no text.
	Missing int64

	at []byte
}

// Missing is how many bytes of a log could not be read, since it was put aside faster than that, or could not be written.
type Missing int64

func (m Missing) Error() string {
	return strconv.FormatInt(int64(m), 10) + " bytes of the log are missing: it was put aside faster than it was read (see --log-size), or its disk was full"
}

// Err is nil if nothing is missing.
func (m Missing) Err() error {
	if m == 0 {
		return nil
	}
	return m
}

// Time is when the piece was printed, the zero time if the log doesn't tell.
func (e Entry) Time() time.Time {
	t, _ := time.Parse(time.RFC3339Nano, string(e.at))
	return t
}

// parseEntry reads a line of a log. False: it is none that is shown.
func parseEntry(line []byte) (e Entry, ok bool) {
	at, rest, _ := bytes.Cut(line, []byte{' '})
	stream, rest, _ := bytes.Cut(rest, []byte{' '})
	tag, text, found := bytes.Cut(rest, []byte{' '})
	if !found || len(text) == 0 || text[len(text)-1] != '\n' {
		return Entry{}, false
	}
	e = Entry{Text: text, at: at}
	switch string(stream) {
	case "stdout":
		e.Stream = "stdout"
	case "stderr":
		e.Stream = "stderr"
	case lostStream:
		n, err := strconv.ParseInt(string(text[:len(text)-1]), 10, 64)
		return Entry{Missing: n, at: at}, err == nil && n > 0
	default:
		return Entry{}, false
	}
	switch string(tag) {
	case "F":
	case "P":
		e.Text = text[:len(text)-1]
	default:
		return Entry{}, false
	}
	return e, true
}

// offsetOf is what a file that begins like this says of its place in the log, -1 if it doesn't.
func offsetOf(b []byte) int64 {
	line, _, _ := bytes.Cut(b, []byte{'\n'})
	_, rest, _ := bytes.Cut(line, []byte{' '})
	text, ok := bytes.CutPrefix(rest, []byte(offsetStream+" F "))
	n, err := strconv.ParseInt(string(text), 10, 64)
	if !ok || err != nil || n < 0 {
		return -1
	}
	return n
}

// Reader reads a log from an end that moves, through rotations. What was put aside twice before it could be opened is
// missing, which an entry says.
type Reader struct {
	dir Dir

	mu    sync.Mutex
	files []*os.File // still to be read, the oldest first
	part  []byte
	pos   int64 // in the whole log, of what was read of files[0]; -1 if that is not known
	fresh bool  // files[0] was not read yet
}

// backlog is how many files a reader holds open that it has not read.
const backlog = 64

// maxLine bounds what is kept of a line that doesn't end.
const maxLine = 1 << 20

// NewReader returns a reader of a log from its beginning, or from where it ends now.
func NewReader(d Dir, fromEnd bool) (*Reader, error) {
	r := &Reader{dir: d, pos: -1, fresh: true}
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
		r.enter(r.files[0])
		n, err := r.files[0].Seek(0, io.SeekEnd)
		if err != nil {
			r.Close()
			return nil, err
		}
		if r.pos >= 0 {
			r.pos += n
		}
	}
	return r, nil
}

// find adds the files that are new.
func (r *Reader) find() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []*os.File
	for tries := 0; ; tries++ {
		found = found[:0]
		for _, name := range []string{r.dir.current() + ".1", r.dir.current()} {
			f, err := r.dir.Tree.Open(name)
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
	if room := max(0, backlog-len(r.files)); len(found) > room {
		closeFiles(found[room:])
		found = found[:room]
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

// Close closes the files.
func (r *Reader) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	closeFiles(r.files)
	r.files = nil
}

// current returns the first of the files, nil if there is none, and whether it is the last.
func (r *Reader) current() (f *os.File, last bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.files) == 0 {
		return nil, true
	}
	return r.files[0], len(r.files) == 1
}

// enter begins a file, and returns how many bytes of the log are missing before it.
func (r *Reader) enter(f *os.File) (missing int64) {
	first := make([]byte, 128)
	n, _ := f.ReadAt(first, 0)
	if n == 0 {
		return 0 // its writer has just made it
	}
	r.fresh = false
	offset := offsetOf(first[:n])
	if offset >= 0 && r.pos >= 0 {
		missing = max(0, offset-r.pos)
	}
	r.pos = offset
	return missing
}

// Read calls f with what is new.
func (r *Reader) Read(f func(Entry) error) error {
	if err := r.find(); err != nil {
		return err
	}
	for {
		file, last := r.current()
		if file == nil {
			return nil
		}
		if r.fresh {
			if missing := r.enter(file); missing > 0 {
				if err := f(Entry{Missing: missing}); err != nil {
					return err
				}
			}
		}
		if err := r.readFile(file, f); err != nil || last {
			return err
		}
		// It was put aside before it was read to its end: nothing more comes to it.
		r.mu.Lock()
		r.files, r.part, r.fresh = r.files[1:], nil, true
		r.mu.Unlock()
		_ = file.Close()
	}
}

// readFile reads a file to its end.
func (r *Reader) readFile(file *os.File, f func(Entry) error) error {
	in := bufio.NewReaderSize(file, 64<<10)
	for {
		line, err := in.ReadSlice('\n')
		if r.pos >= 0 {
			r.pos += int64(len(line))
		}
		if err != nil || len(r.part) > 0 {
			r.part = append(r.part, line...)
			line = r.part
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull) && len(r.part) < maxLine:
			continue
		case errors.Is(err, io.EOF):
			return nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return err
		}
		r.part = nil
		if e, ok := parseEntry(line); ok {
			if err := f(e); err != nil {
				return err
			}
		}
	}
}

// Follow calls f with all that comes until done says that nothing comes any more, and idle, unless it is nil, whenever
// there is nothing more for now. New files are opened as they come, however slow f is.
func (r *Reader) Follow(ctx context.Context, w *Watcher, done func() (bool, error), f func(Entry) error, idle func() error) error {
	w.onChange(func() { _ = r.find() })
	defer w.onChange(nil)
	for {
		over, err := done() // before the last read
		if err != nil {
			return err
		}
		if err := r.Read(f); err != nil {
			return err
		}
		if idle != nil {
			if err := idle(); err != nil {
				return err
			}
		}
		if over {
			return nil
		}
		if err := w.Wait(ctx, time.Second); err != nil {
			return err
		}
	}
}

// Tail keeps the entries of a log's last lines.
type Tail struct {
	n       int
	lines   [][]Entry
	partial bool
}

// NewTail keeps n lines.
func NewTail(n int) *Tail { return &Tail{n: n} }

// Add adds an entry.
func (t *Tail) Add(e Entry) error {
	if e.Missing > 0 {
		return nil
	}
	e.Text, e.at = bytes.Clone(e.Text), bytes.Clone(e.at)
	if t.partial {
		last := len(t.lines) - 1
		t.lines[last] = append(t.lines[last], e)
	} else {
		if len(t.lines) == t.n {
			t.lines = t.lines[1:]
		}
		t.lines = append(t.lines, []Entry{e})
	}
	t.partial = len(e.Text) == 0 || e.Text[len(e.Text)-1] != '\n'
	return nil
}

// Each calls f with them.
func (t *Tail) Each(f func(Entry) error) error {
	for _, line := range t.lines {
		for _, e := range line {
			if err := f(e); err != nil {
				return err
			}
		}
	}
	return nil
}
