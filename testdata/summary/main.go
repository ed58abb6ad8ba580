// Summary runs go test in the modules that its arguments name. The last line that it prints has the numbers of tests
// that passed, failed and were skipped.
//
// The words of TESTFLAGS are passed to go test. With -v among them, its whole output is printed; otherwise only the
// packages that have tests, and the failures.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// event is a line of the output of go test -json: see go doc test2json.
type event struct {
	Action, Package, Test, Output string
}

type summary struct {
	out                     io.Writer
	verbose                 bool
	output                  map[string]*strings.Builder // what each unfinished test has printed
	passed, failed, skipped int
	reasons                 map[string]int
	failures                []failure
}

// failure is a test that failed. If a package failed, Test is empty.
type failure struct {
	event
	why string
}

// reason finds in a test's output why it was skipped or failed: "    x_test.go:12: no crun". A script fails with
// "    FAIL: x.txtar:12: status 0, not 3", after what its command printed.
var reason = regexp.MustCompile(`(?m)^\s+(?:\S+_test\.go:\d+: |FAIL: )(.*)$`)

func main() {
	s := summary{
		out: os.Stdout, output: map[string]*strings.Builder{}, reasons: map[string]int{},
		verbose: slices.Contains(strings.Fields(os.Getenv("TESTFLAGS")), "-v"),
	}
	ok := true
	for _, module := range os.Args[1:] {
		fmt.Fprintln(s.out, "== "+module)
		if err := s.test(module); err != nil {
			fmt.Fprintf(os.Stderr, "summary: %s: %v\n", module, err)
			ok = false
		}
	}
	s.close()
	if !ok || s.failed > 0 {
		os.Exit(1)
	}
}

func (s *summary) test(module string) error {
	c := exec.Command("go", append(append([]string{"test", "-json"}, strings.Fields(os.Getenv("TESTFLAGS"))...), "./...")...)
	c.Dir, c.Stderr = module, os.Stderr
	pipe, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	lines := bufio.NewReader(pipe)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			s.line(line)
		}
		if err != nil {
			break
		}
	}
	return c.Wait()
}

func (s *summary) line(line string) {
	var e event
	if json.Unmarshal([]byte(line), &e) != nil {
		fmt.Fprint(s.out, line)
		return
	}
	key := e.Package + "\x00" + e.Test
	switch e.Action {
	case "output", "build-output":
		if !s.verbose && strings.HasPrefix(e.Output, "=== ") {
			return
		}
		if s.verbose || e.Action == "build-output" {
			fmt.Fprint(s.out, e.Output)
		}
		if e.Action == "build-output" {
			return
		}
		if s.output[key] == nil {
			s.output[key] = &strings.Builder{}
		}
		s.output[key].WriteString(e.Output)
	case "pass", "fail", "skip":
		text := ""
		if b := s.output[key]; b != nil {
			text = b.String()
		}
		s.end(e, text)
		delete(s.output, key)
	}
}

// end counts a test that has ended. Unless all output is printed anyway, it prints the last line of a package that
// passed, and the whole output of one that failed.
func (s *summary) end(e event, output string) {
	if e.Action == "fail" && !s.verbose {
		fmt.Fprint(s.out, output)
	}
	switch {
	case e.Test == "":
		lines := strings.Split(strings.TrimSuffix(output, "\n"), "\n")
		if e.Action == "pass" && !s.verbose {
			fmt.Fprintln(s.out, lines[len(lines)-1])
		}
	case e.Action == "pass":
		s.passed++
	case e.Action == "fail":
		s.failed++
	default:
		s.skipped++
		s.reasons[why(output)]++
	}
	if e.Action == "fail" {
		s.failures = append(s.failures, failure{e, why(output)})
	}
}

// why finds in a test's output why it was skipped, or its first failure, and of a script what it did last.
func why(output string) string {
	m := reason.FindStringSubmatchIndex(output)
	if m == nil {
		return "no reason given"
	}
	why := output[m[2]:m[3]]
	if strings.HasSuffix(output[:m[2]], "FAIL: ") {
		before := strings.Fields(output[:m[0]])
		why += ", after: " + strings.Join(before[max(0, len(before)-30):], " ")
	}
	return why
}

// close prints why tests were skipped, unless all output was printed, one line for each test that failed, and the last
// line with the numbers. The failures are repeated here because readers of a long log often look at its end only.
func (s *summary) close() {
	if !s.verbose {
		for _, why := range slices.Sorted(maps.Keys(s.reasons)) {
			fmt.Fprintf(s.out, "skipped %d: %s\n", s.reasons[why], why)
		}
	}
	for _, f := range s.failures {
		// The failure of a test below this one says why.
		if !slices.ContainsFunc(s.failures, func(g failure) bool {
			return g.Package == f.Package && g.Test != f.Test && (f.Test == "" || strings.HasPrefix(g.Test, f.Test+"/"))
		}) {
			fmt.Fprintf(s.out, "failed: %s: %.600s\n", strings.TrimSpace(f.Package+" "+f.Test), f.why)
		}
	}
	fmt.Fprintf(s.out, "%d passed, %d failed, %d skipped\n", s.passed, s.failed, s.skipped)
}
