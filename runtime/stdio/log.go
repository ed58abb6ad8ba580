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
	"slices"
	"strconv"
	"sync"
	"time"

	"distkit/disk"
)

// defaultLimit is the size at which a log is put aside, unless the caller says otherwise.
const defaultLimit = 16 << 20

// pieceRoom is the most bytes of a line that are written at once.
const pieceRoom = 16 << 10

// Streams of a log's lines besides stdout and stderr. A reader that doesn't know a stream skips its lines.
const (
	offsetStream = "offset" // the first line of a file: how many bytes of the log came before the file
	lostStream   = "lost"   // how many bytes could not be written at this place
	beginStream  = "begin"  // a run begins here
)

// Dir is the directory that a log is in.
type Dir struct {
	Tree disk.Tree
	Name string
}

func (d Dir) current() string { return filepath.Join(d.Name, "log") }

// Writer writes what a process prints to its log, in Kubernetes' form: each line has a time, the stream, F (full) or P
// (partial: the line goes on), and the bytes. A file that reaches the limit is renamed to log.1 and replaces the one there,
// so that both together take at most twice the limit.
type Writer struct {
	dir   Dir
	limit int64

	mu     sync.Mutex
	file   *os.File
	size   int64
	offset int64 // of the file in the whole log
	lost   int64 // bytes that could not be written since the last line that was
	buf    []byte
}

// NewWriter returns a writer of the log in a directory. It creates the log at once, so that the log can be followed, and
// appends to one that an earlier process has left. A limit of 0 is 16 MiB.
func NewWriter(d Dir, limit int64) (*Writer, error) {
	if limit <= 0 {
		limit = defaultLimit
	}
	l := &Writer{dir: d, limit: limit}
	return l, l.open()
}

// Write appends output of a stream. It has no error, because a full disk must not stop the process that prints: bytes that
// can't be written are counted, and the count is written for readers once there is room.
func (l *Writer) Write(stream string, p []byte) {
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

// flush writes the buffer, to a new file if this one has no room for it.
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

// append writes lines to the file: all of them, or nothing.
func (l *Writer) append(b []byte) error {
	n, err := l.file.Write(b)
	if err != nil && n > 0 {
		_ = l.file.Truncate(l.size)
		n = 0
	}
	l.size += int64(n)
	return err
}

// open opens the current file. It ends a line that a killed writer left incomplete.
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
	if l.size == 0 {
		return l.append(appendLine(nil, time.Now().UTC(), offsetStream, 'F', strconv.AppendInt(nil, l.offset, 10)))
	}
	l.offset = max(0, offsetOf(beginning(f)))
	last := make([]byte, 1)
	if _, err := f.ReadAt(last, l.size-1); err == nil && last[0] != '\n' {
		return l.append([]byte{'\n'})
	}
	return nil
}

// Begin marks the beginning of a run, after the output of earlier runs. Readers skip the mark.
func (l *Writer) Begin() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = l.append(appendLine(nil, time.Now().UTC(), beginStream, 'F', nil))
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
	Text   []byte // with its newline if the line ends; valid only during the call that gets the entry
	// Missing, if it isn't 0, is the number of bytes that the log lacks at this place. Such an entry has no text.
	Missing int64

	at []byte // the time, as it is in the log
}

// Missing is an error: how many bytes of a log were put aside before they were read, or could not be written.
type Missing int64

func (m Missing) Error() string {
	return strconv.FormatInt(int64(m), 10) + " bytes of the log are missing: it was put aside faster than it was read (see --log-size), or its disk was full"
}

// Err returns m, or nil if nothing is missing.
func (m Missing) Err() error {
	if m == 0 {
		return nil
	}
	return m
}

// Time returns when the piece was printed, or the zero time if the log doesn't say.
func (e Entry) Time() time.Time {
	t, _ := time.Parse(time.RFC3339Nano, string(e.at))
	return t
}

// parseEntry parses a line of a log. ok is false if readers skip the line.
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

// beginning returns the first bytes of a file: enough for its offset line.
func beginning(f *os.File) []byte {
	b := make([]byte, 128)
	n, _ := f.ReadAt(b, 0)
	return b[:n]
}

// offsetOf returns the offset in the log of a file that begins with b. It is -1 if the file doesn't say.
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

// Reader reads a log that grows, across rotations. If a file was put aside twice before the reader opened it, an entry says
// how many bytes are missing.
type Reader struct {
	dir Dir

	mu    sync.Mutex
	files []*os.File // still to be read, the oldest first
	full  bool       // there are newer files, for which files had no room
	part  []byte
	pos   int64 // the offset in the whole log up to which files[0] was read; -1 if it isn't known
	fresh bool  // nothing of files[0] was read yet
}

// backlog is the most files that a reader holds open.
const backlog = 64

// maxLine is the most bytes of a line that a reader keeps while it looks for the line's end.
const maxLine = 1 << 20

// NewReader returns a reader of a log, from its beginning or from its present end.
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

// find opens the files that the reader doesn't have yet. It opens the current file first: if the log is put aside meanwhile,
// what is opened then is the same file or the one after it. In the other order, the file between the two could be passed over.
func (r *Reader) find() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var found []*os.File
	for _, name := range []string{r.dir.current(), r.dir.current() + ".1"} {
		f, err := r.dir.Tree.Open(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			closeFiles(found)
			return err
		case len(found) == 1 && sameFile(f, found[0]): // the watcher tells of the file that is current now
			_ = f.Close()
		case len(found) == 1 && isAfter(f, found[0]):
			found = append(found, f)
		default:
			found = slices.Insert(found, 0, f)
		}
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
	room := max(0, backlog-len(r.files))
	if r.full = len(found) > room; r.full {
		closeFiles(found[room:])
		found = found[:room]
	}
	r.files = append(r.files, found...)
	return nil
}

// isAfter reports whether a file comes after another one in the log. One that doesn't say has just been made.
func isAfter(a, b *os.File) bool {
	before := offsetOf(beginning(b))
	return before >= 0 && offsetOf(beginning(a)) > before
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

// current returns the first file, or nil if there is none, whether it is the last one that is open, and whether there were
// newer ones that could not be opened.
func (r *Reader) current() (f *os.File, last, full bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.files) == 0 {
		return nil, true, false
	}
	return r.files[0], len(r.files) == 1, r.full
}

// enter begins to read a file. It returns how many bytes of the log are missing before the file.
func (r *Reader) enter(f *os.File) (missing int64) {
	first := beginning(f)
	if len(first) == 0 {
		return 0 // its writer has just made it
	}
	r.fresh = false
	offset := offsetOf(first)
	if offset >= 0 && r.pos >= 0 {
		missing = max(0, offset-r.pos)
	}
	r.pos = offset
	return missing
}

// Read calls f with each entry that is new.
func (r *Reader) Read(f func(Entry) error) error {
	if err := r.find(); err != nil {
		return err
	}
	for {
		file, last, full := r.current()
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
		if err := r.readFile(file, f); err != nil {
			return err
		}
		switch {
		case !last:
		case !full:
			return nil
		default:
			if err := r.find(); err != nil {
				return err
			}
			continue
		}
		// The file was put aside before it was read to its end, so nothing is added to it any more.
		r.mu.Lock()
		r.files, r.part, r.fresh = r.files[1:], nil, true
		r.mu.Unlock()
		_ = file.Close()
	}
}

// readFile calls f with each entry of a file, to the file's end.
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

// Follow calls f with each entry until done reports that the log is complete. Whenever all entries so far were read, it
// calls idle, unless that is nil. It opens new files as they appear, even while f is busy.
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

// NewTail returns a Tail of n lines.
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

// Each calls f with the entries that were kept.
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
