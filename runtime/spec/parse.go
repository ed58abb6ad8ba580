package spec

import (
	"bufio"
	"encoding/csv"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ParseMount parses docker's --mount: comma-separated type=, src= (source=), dst= (target=,
// destination=), ro (readonly) and options=a:b, as ctr has it. The type is bind unless given;
// a bind's source becomes absolute. Anything else is InvalidArgument.
func ParseMount(s string) (specs.Mount, error) {
	m := specs.Mount{Type: "bind"}
	bad := func(format string, a ...any) (specs.Mount, error) {
		return specs.Mount{}, invalid("mount %q: %s", s, fmt.Sprintf(format, a...))
	}
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return bad("%v", err)
	}
	readonly, propagation, recursive := false, "rprivate", "rbind"
	var tmpfs []string
	for _, f := range fields {
		key, value, has := strings.Cut(f, "=")
		switch strings.ToLower(key) {
		case "type":
			m.Type = value
		case "src", "source":
			m.Source = value
		case "dst", "dest", "destination", "target":
			m.Destination = value
		case "ro", "readonly":
			readonly = true
			if has {
				if readonly, err = strconv.ParseBool(value); err != nil {
					return bad("%s is neither true nor false", f)
				}
			}
		case "bind-propagation":
			propagation = value
		case "bind-nonrecursive":
			recursive = "bind"
		case "tmpfs-size":
			n, err := ParseSize(value)
			if err != nil {
				return bad("%v", err)
			}
			tmpfs = append(tmpfs, "size="+strconv.FormatInt(n, 10))
		case "tmpfs-mode":
			tmpfs = append(tmpfs, "mode="+value)
		case "options":
			m.Options = append(m.Options, strings.Split(value, ":")...)
		default:
			return bad("unknown key %q", key)
		}
	}
	if m.Destination == "" {
		return bad("dst is missing")
	}
	switch m.Type {
	case "bind", VolumeType:
		if m.Source == "" {
			return bad("src is missing")
		}
		if m.Type == "bind" {
			if m.Source, err = filepath.Abs(m.Source); err != nil {
				return bad("%v", err)
			}
		}
		if !slices.ContainsFunc(m.Options, func(o string) bool { return o == "bind" || o == "rbind" }) {
			m.Options = append([]string{recursive}, m.Options...)
		}
		if !slices.ContainsFunc(m.Options, isPropagation) {
			if !isPropagation(propagation) {
				return bad("unknown propagation %q", propagation)
			}
			m.Options = append(m.Options, propagation)
		}
	case "tmpfs":
		if m.Source == "" {
			m.Source = "tmpfs"
		}
		if m.Options == nil {
			m.Options = []string{"nosuid", "nodev", "noexec"}
		}
		m.Options = append(m.Options, tmpfs...)
	case "":
		return bad("type is empty")
	}
	if readonly {
		m.Options = append(m.Options, "ro")
	}
	return m, nil
}

func isPropagation(o string) bool {
	return slices.Contains([]string{"private", "rprivate", "shared", "rshared", "slave", "rslave", "unbindable", "runbindable"}, o)
}

// VolumeType is the type of a mount whose source is the name of a volume. No runtime knows it: whoever has the volumes makes it a bind.
const VolumeType = "volume"

// ParseVolume parses docker's --volume SOURCE:TARGET[:OPTION,…]. A source without a slash is the name of a volume, but for . and ..
func ParseVolume(s string) (specs.Mount, error) {
	f := strings.Split(s, ":")
	if len(f) < 2 || len(f) > 3 || f[0] == "" || f[1] == "" {
		return specs.Mount{}, invalid("volume %q is not SOURCE:TARGET[:OPTION,…]", s)
	}
	m := specs.Mount{Type: VolumeType, Source: f[0], Destination: f[1], Options: []string{"rbind"}}
	if strings.Contains(f[0], "/") || f[0] == "." || f[0] == ".." {
		source, err := filepath.Abs(f[0])
		if err != nil {
			return specs.Mount{}, fmt.Errorf("volume %q: %w", s, err)
		}
		m.Type, m.Source = "bind", source
	}
	propagation := "rprivate"
	if len(f) == 3 {
		for _, o := range strings.Split(f[2], ",") {
			switch {
			case o == "ro", o == "rw", o == "nosuid", o == "nodev", o == "noexec":
				m.Options = append(m.Options, o)
			case isPropagation(o):
				propagation = o
			default:
				return specs.Mount{}, invalid("volume %q: unknown option %q", s, o)
			}
		}
	}
	m.Options = append(m.Options, propagation)
	return m, nil
}

// ParseTmpfs parses docker's --tmpfs TARGET[:OPTION,…].
func ParseTmpfs(s string) (specs.Mount, error) {
	target, options, _ := strings.Cut(s, ":")
	m := specs.Mount{Type: "tmpfs", Source: "tmpfs", Destination: target, Options: []string{"nosuid", "nodev", "noexec"}}
	if options != "" {
		m.Options = append(m.Options, strings.Split(options, ",")...)
	}
	if !path.IsAbs(target) {
		return m, invalid("tmpfs %q is not an absolute path", s)
	}
	return m, nil
}

// ParseRlimit parses NAME=SOFT[:HARD] with names as in docker's --ulimit (nofile) or in
// setrlimit(2) (RLIMIT_NOFILE); -1 and unlimited are no limit.
func ParseRlimit(s string) (specs.POSIXRlimit, error) {
	bad := func() (specs.POSIXRlimit, error) {
		return specs.POSIXRlimit{}, invalid("rlimit %q is not NAME=SOFT[:HARD]", s)
	}
	name, value, ok := strings.Cut(s, "=")
	if !ok {
		return bad()
	}
	name = strings.TrimPrefix(strings.ToUpper(name), "RLIMIT_")
	if !slices.Contains(strings.Fields("AS CORE CPU DATA FSIZE LOCKS MEMLOCK MSGQUEUE NICE NOFILE NPROC RSS RTPRIO RTTIME SIGPENDING STACK"), name) {
		return specs.POSIXRlimit{}, invalid("rlimit %q: unknown limit", s)
	}
	parse := func(s string) (uint64, bool) {
		if s == "-1" || s == "unlimited" {
			return math.MaxUint64, true
		}
		n, err := strconv.ParseUint(s, 10, 64)
		return n, err == nil
	}
	soft, hard, both := strings.Cut(value, ":")
	if !both {
		hard = soft
	}
	r := specs.POSIXRlimit{Type: "RLIMIT_" + name}
	var okSoft, okHard bool
	r.Soft, okSoft = parse(soft)
	r.Hard, okHard = parse(hard)
	if !okSoft || !okHard {
		return bad()
	}
	if r.Soft > r.Hard {
		return r, invalid("rlimit %q: soft is above hard", s)
	}
	return r, nil
}

// ParseDevice parses docker's --device SOURCE[:TARGET][:ACCESS], as [HostDevices] takes them.
func ParseDevice(s string) ([]Device, error) {
	f := strings.Split(s, ":")
	source, target, access := f[0], f[0], "rwm"
	switch {
	case len(f) == 3:
		target, access = f[1], f[2]
	case len(f) == 2 && strings.HasPrefix(f[1], "/"):
		target = f[1]
	case len(f) == 2:
		access = f[1]
	case len(f) > 3:
		return nil, invalid("device %q is not SOURCE[:TARGET][:ACCESS]", s)
	}
	return HostDevices(source, target, access)
}

// ParseSize parses bytes with an optional binary unit as docker's --memory: 512m, 1g, 64KiB.
func ParseSize(s string) (int64, error) {
	digits := strings.TrimRight(strings.ToLower(s), "kmgtib")
	shift, ok := map[string]int{
		"": 0, "b": 0, "k": 10, "kb": 10, "kib": 10, "m": 20, "mb": 20, "mib": 20,
		"g": 30, "gb": 30, "gib": 30, "t": 40, "tb": 40, "tib": 40,
	}[strings.ToLower(s[len(digits):])]
	n, err := strconv.ParseFloat(digits, 64)
	if !ok || err != nil || !(n >= 0) || n*float64(int64(1)<<shift) >= 1<<62 {
		return 0, invalid("size %q is not a number of bytes with k, m, g or t", s)
	}
	return int64(n * float64(int64(1)<<shift)), nil
}

// ParseLimit parses a size as [ParseSize] does, and -1, which is no limit.
func ParseLimit(s string) (int64, error) {
	if s == "-1" {
		return -1, nil
	}
	return ParseSize(s)
}

// ParseEnv resolves docker's --env: NAME=VALUE is taken as it is; NAME alone becomes the
// variable of this process, or stays as it is, which removes it.
func ParseEnv(s string) string {
	if !strings.Contains(s, "=") {
		if v, ok := os.LookupEnv(s); ok {
			return s + "=" + v
		}
	}
	return s
}

// ReadEnv reads docker's --env-file: a variable a line as [ParseEnv] takes it, no quoting;
// empty lines and those that begin with # are skipped.
func ReadEnv(r io.Reader) ([]string, error) {
	var env []string
	lines := bufio.NewScanner(io.LimitReader(r, MaxDocument))
	lines.Buffer(nil, maxText+1)
	for lines.Scan() {
		line := strings.TrimLeft(lines.Text(), " \t")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		env = append(env, ParseEnv(line))
	}
	if err := lines.Err(); err != nil {
		return nil, invalid("read variables: %v", err)
	}
	return env, nil
}
