// Shlint reports shell code in which a value from outside could become shell code or a shell number.
//
// Bash evaluates the operands of arithmetic. A variable with the value a[$(command)] runs the command in $((x)), in [[
// $x -eq 0 ]], in an array's index, and in a few builtins that take the name of a variable. So a variable there must be
// one that the script itself counts, or must have been checked by [[ $x =~ ^[0-9]+$ ]]. And eval, trap, sh -c, and the
// format of printf may have literal text only.
//
// A line "# shlint: REASON" exempts the line after it.
package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	resyntax "regexp/syntax"
	"slices"
	"strconv"
	"strings"

	"mvdan.cc/sh/v3/syntax"
)

func main() {
	found := 0
	for _, root := range os.Args[1:] {
		files, err := scripts(root)
		if err != nil {
			fmt.Fprintln(os.Stderr, "shlint:", err)
			os.Exit(2)
		}
		for _, name := range slices.Sorted(maps.Keys(files)) {
			for _, p := range lintFile(name, files[name]) {
				fmt.Printf("%s:%d: %s\n", name, p.line, p.text)
				found++
			}
		}
	}
	if found > 0 {
		os.Exit(1)
	}
}

// scripts reads the files below root that contain shell code: scripts, pages, scenarios and the sources of commands.
func scripts(root string) (map[string]string, error) {
	files := map[string]string{}
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		switch base := d.Name(); {
		case err != nil:
			return err
		case d.IsDir() && (base == ".git" || base == "bin" && name != root):
			return filepath.SkipDir
		case !d.Type().IsRegular() || strings.HasSuffix(base, "_test.go"):
			return nil
		}
		b, err := os.ReadFile(name)
		switch filepath.Ext(name) {
		case ".go", ".md", ".txtar", ".sh", ".bash":
			files[name] = string(b)
		default:
			if shebang.Match(b) {
				files[name] = string(b)
			}
		}
		return err
	})
	return files, err
}

type problem struct {
	line int
	text string
}

var shebang = regexp.MustCompile(`^#!.*\b(ba)?sh\b`)

// lintFile checks a script, or the shell code in a page, a Go source or a scenario.
func lintFile(name, text string) []problem {
	var found []problem
	add := func(script string, line int, must bool) {
		for _, p := range lint(script, must) {
			found = append(found, problem{p.line + line - 1, p.text})
		}
	}
	switch filepath.Ext(name) {
	case ".go":
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, name, text, parser.SkipObjectResolution)
		if err != nil {
			return []problem{{1, err.Error()}}
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
				if s, err := strconv.Unquote(lit.Value); err == nil && isDangerous(s) {
					add(s, fset.Position(lit.Pos()).Line, false)
				}
			}
			return true
		})
	case ".md":
		for line, block := range codeBlocks(text) {
			add(block, line, false)
		}
	case ".txtar":
		for line, block := range sections(text) {
			add(block, line, true)
		}
	default:
		add(text, 1, true)
	}
	slices.SortFunc(found, func(a, b problem) int { return cmp.Compare(a.line, b.line) })
	return slices.Compact(found)
}

// codeBlocks returns the indented and fenced blocks of a page, by the line at which each begins.
func codeBlocks(text string) map[int]string {
	blocks := map[int]string{}
	begin, fenced := 0, false
	for i, line := range strings.Split(text, "\n") {
		switch rest, indented := strings.CutPrefix(line, "    "); {
		case strings.HasPrefix(line, "```"):
			fenced, begin = !fenced, 0
			continue
		case fenced:
		case indented:
			line = rest
		case strings.TrimSpace(line) != "" || begin == 0:
			begin = 0
			continue
		}
		if begin == 0 {
			begin = i + 1
		}
		blocks[begin] += line + "\n"
	}
	return blocks
}

// sections returns the shell scripts among the files of a scenario.
func sections(text string) map[int]string {
	scripts := map[int]string{}
	begin, script := 0, false
	for i, line := range strings.Split(text, "\n") {
		if name, ok := strings.CutPrefix(line, "-- "); ok && strings.HasSuffix(name, " --") {
			begin, script = i+2, strings.HasSuffix(name, ".sh --")
			continue
		}
		script = script || i+1 == begin && shebang.MatchString(line)
		if script {
			scripts[begin] += line + "\n"
		}
	}
	return scripts
}

// isDangerous reports whether text would need a check if it is shell code.
func isDangerous(text string) bool {
	return strings.Contains(text, "((") || strings.Contains(text, "[[ ") || strings.Contains(text, "eval ") || strings.Contains(text, "printf ")
}

// lint checks a script. Text that can't be parsed is a problem if it must be shell code.
func lint(script string, must bool) []problem {
	f, err := syntax.NewParser(syntax.Variant(syntax.LangBash), syntax.KeepComments(true)).Parse(strings.NewReader(script), "")
	if err != nil {
		if must {
			return []problem{{1, err.Error()}}
		}
		return nil
	}
	l := &linter{text: script, locals: map[string]bool{}, assoc: map[string]bool{}, events: map[string][]event{}}
	l.scan(f, l.declaration)
	l.scan(f, l.assignment)
	l.scan(f, l.judge)
	l.judgeNumbers()
	exempt := map[uint]bool{}
	syntax.Walk(f, func(n syntax.Node) bool {
		if c, ok := n.(*syntax.Comment); ok {
			if reason, ok := strings.CutPrefix(c.Text, " shlint: "); ok && strings.TrimSpace(reason) != "" {
				exempt[c.Hash.Line()+1] = true
			}
		}
		return true
	})
	return slices.DeleteFunc(l.found, func(p problem) bool { return exempt[uint(p.line)] })
}

type linter struct {
	text     string
	function string // the function that is being scanned
	locals   map[string]bool
	assoc    map[string]bool
	events   map[string][]event // the events of each variable, in the order of the text
	found    []problem
}

// An event is a place where a variable gets a value, is checked to be a number, or has to be one.
type event struct {
	kind kind
	pos  syntax.Pos
}

type kind int

const (
	counted kind = iota // assigned a value that the script itself makes
	foreign             // assigned anything else
	checked
	used
)

func (l *linter) scan(f *syntax.File, visit func(syntax.Node)) {
	var stack []string
	syntax.Walk(f, func(n syntax.Node) bool {
		if n == nil {
			l.function, stack = stack[len(stack)-1], stack[:len(stack)-1]
			return true
		}
		stack = append(stack, l.function)
		if fn, ok := n.(*syntax.FuncDecl); ok && fn.Name != nil {
			l.function = fn.Name.Value
		}
		visit(n)
		return true
	})
}

func (l *linter) problem(n syntax.Node, format string, a ...any) {
	l.found = append(l.found, problem{int(n.Pos().Line()), fmt.Sprintf(format, a...)})
}

// key names a variable. A variable that is local to a function is not the script's variable of that name.
func (l *linter) key(name string) string {
	if k := l.function + " " + name; l.locals[k] {
		return k
	}
	return name
}

func (l *linter) note(name string, k kind, n syntax.Node) {
	key := l.key(name)
	l.events[key] = append(l.events[key], event{k, n.Pos()})
}

func (l *linter) declaration(n syntax.Node) {
	d, ok := n.(*syntax.DeclClause)
	if !ok {
		return
	}
	isLocal := l.function != "" && (d.Variant.Value == "local" || d.Variant.Value == "declare" || d.Variant.Value == "typeset")
	flags := ""
	for _, a := range d.Args {
		if a.Name == nil {
			flags += literal(a.Value)
			continue
		}
		if isLocal && !strings.Contains(flags, "g") {
			l.locals[l.function+" "+a.Name.Value] = true
		}
		if strings.Contains(flags, "A") {
			l.assoc[l.key(a.Name.Value)] = true
		}
	}
}

// readOptions are the options of read, mapfile and readarray whose argument is not a variable.
const readOptions = "dinNptuCcOs"

func (l *linter) assignment(n syntax.Node) {
	switch n := n.(type) {
	case *syntax.Assign:
		if n.Name == nil || n.Naked {
			return
		}
		k := counted
		if n.Value != nil && !l.isOwn(n.Value) {
			k = foreign
		}
		if n.Array != nil {
			for _, e := range n.Array.Elems {
				if e.Value != nil && (!l.isOwn(e.Value) || isPattern(e.Value)) {
					k = foreign
				}
			}
		}
		l.note(n.Name.Value, k, n)
	case *syntax.WordIter:
		k := counted
		if !n.InPos.IsValid() || slices.ContainsFunc(n.Items, func(w *syntax.Word) bool { return !l.isOwn(w) || isPattern(w) }) {
			k = foreign
		}
		l.note(n.Name.Value, k, n)
	case *syntax.CallExpr:
		args := words(n)
		if len(args) == 0 {
			return
		}
		switch args[0] {
		case "read", "mapfile", "readarray":
			for i := 1; i < len(args); i++ {
				if len(args[i]) == 2 && args[i][0] == '-' && strings.Contains(readOptions, args[i][1:]) {
					i++
				} else if syntax.ValidName(args[i]) {
					l.note(args[i], foreign, n.Args[i])
				}
			}
		case "printf":
			if len(args) > 2 && args[1] == "-v" {
				l.note(args[2], foreign, n)
			}
		case "getopts":
			if len(args) > 2 {
				l.note(args[2], foreign, n)
			}
		}
	case *syntax.BinaryArithm:
		if w, ok := n.X.(*syntax.Word); ok && n.Op.String() != "==" && strings.HasSuffix(n.Op.String(), "=") && syntax.ValidName(literal(w)) {
			l.note(literal(w), counted, n)
		}
	case *syntax.TestClause:
		l.check(n.X, false)
	}
}

// check records the variables that a test shows to be numbers: if the test is true, or, with not, if it is false. A
// test on one side of an "or" shows nothing.
func (l *linter) check(n syntax.TestExpr, not bool) {
	switch n := n.(type) {
	case *syntax.ParenTest:
		l.check(n.X, not)
	case *syntax.UnaryTest:
		if n.Op == syntax.TsNot {
			l.check(n.X, !not)
		}
	case *syntax.BinaryTest:
		switch n.Op {
		case syntax.AndTest, syntax.OrTest:
			if (n.Op == syntax.OrTest) == not {
				l.check(n.X, not)
				l.check(n.Y, not)
			}
		case syntax.TsReMatch:
			y := l.text[n.Y.Pos().Offset():n.Y.End().Offset()]
			if x, ok := n.X.(*syntax.Word); ok && isNumeric(y) {
				if p := variable(x); p != nil {
					l.note(p.Param.Value, checked, n)
				}
			}
		}
	}
}

// isNumeric reports whether a regular expression matches only whole numbers.
func isNumeric(expression string) bool {
	re, err := resyntax.Parse(expression, resyntax.POSIX)
	if err != nil || !strings.HasPrefix(expression, "^") || !strings.HasSuffix(expression, "$") || strings.Contains(expression[1:len(expression)-1], "^") {
		return false
	}
	var digits func(*resyntax.Regexp) bool
	digits = func(r *resyntax.Regexp) bool {
		isDigit := func(c rune) bool { return c >= '0' && c <= '9' }
		switch r.Op {
		case resyntax.OpLiteral, resyntax.OpCharClass:
			return !slices.ContainsFunc(r.Rune, func(c rune) bool { return !isDigit(c) })
		case resyntax.OpAlternate:
			// Unless the alternatives are grouped, an anchor holds for one of them only.
			return !slices.ContainsFunc(r.Sub, func(s *resyntax.Regexp) bool { return !digits(s) || hasAnchor(s) })
		case resyntax.OpConcat, resyntax.OpCapture, resyntax.OpStar, resyntax.OpPlus, resyntax.OpQuest, resyntax.OpRepeat:
			return !slices.ContainsFunc(r.Sub, func(s *resyntax.Regexp) bool { return !digits(s) })
		case resyntax.OpBeginText, resyntax.OpEndText, resyntax.OpBeginLine, resyntax.OpEndLine, resyntax.OpEmptyMatch:
			return true
		}
		return false
	}
	return digits(re)
}

func hasAnchor(r *resyntax.Regexp) bool {
	switch r.Op {
	case resyntax.OpBeginText, resyntax.OpEndText, resyntax.OpBeginLine, resyntax.OpEndLine:
		return true
	}
	return slices.ContainsFunc(r.Sub, hasAnchor)
}

// numbers are the parameters that the shell itself counts. dist-ingest sets DIST_OFFSET to a number.
var numbers = []string{"#", "?", "$", "!", "EUID", "UID", "PPID", "BASHPID", "RANDOM", "SRANDOM", "SECONDS", "LINENO",
	"EPOCHSECONDS", "PIPESTATUS", "BASH_SUBSHELL", "OPTIND", "DIST_OFFSET"}

// isOwn reports whether a word consists of text of the script and of numbers.
func (l *linter) isOwn(w *syntax.Word) bool { return !slices.ContainsFunc(w.Parts, l.isForeign) }

func (l *linter) isForeign(part syntax.WordPart) bool {
	switch part := part.(type) {
	case *syntax.DblQuoted:
		return slices.ContainsFunc(part.Parts, l.isForeign)
	case *syntax.ParamExp:
		if part.Excl && part.Index != nil && !l.assoc[l.key(part.Param.Value)] {
			return false // the indices of an array
		}
		return !part.Length && (part.Excl || part.Exp != nil || part.Repl != nil || !slices.Contains(numbers, part.Param.Value))
	case *syntax.CmdSubst, *syntax.ProcSubst:
		return true
	}
	return false // literals, and arithmetic, which is checked separately
}

// isPattern reports whether a word is a pattern for names of files.
func isPattern(w *syntax.Word) bool {
	return slices.ContainsFunc(w.Parts, func(part syntax.WordPart) bool {
		lit, ok := part.(*syntax.Lit)
		_, ext := part.(*syntax.ExtGlob)
		return ext || ok && strings.ContainsAny(lit.Value, "*?[")
	})
}

// isText reports whether a word consists of text of the script and of variables that have only such text.
func (l *linter) isText(w *syntax.Word) bool {
	return !slices.ContainsFunc(w.Parts, func(part syntax.WordPart) bool {
		var parts []syntax.WordPart
		switch part := part.(type) {
		case *syntax.DblQuoted:
			parts = part.Parts
		default:
			parts = []syntax.WordPart{part}
		}
		return slices.ContainsFunc(parts, func(part syntax.WordPart) bool {
			if p, ok := part.(*syntax.ParamExp); ok && !p.Excl && p.Exp == nil && p.Repl == nil && l.isOwnVariable(p.Param.Value) {
				return false
			}
			return l.isForeign(part)
		})
	})
}

func (l *linter) isOwnVariable(name string) bool {
	assigned := false
	for _, e := range l.events[l.key(name)] {
		if e.kind == foreign {
			return false
		}
		assigned = assigned || e.kind == counted
	}
	return assigned
}

// variable returns the expansion that the word consists of, if it is that of a named variable.
func variable(w *syntax.Word) *syntax.ParamExp {
	parts := w.Parts
	if len(parts) == 1 {
		if q, ok := parts[0].(*syntax.DblQuoted); ok {
			parts = q.Parts
		}
	}
	if len(parts) != 1 {
		return nil
	}
	p, ok := parts[0].(*syntax.ParamExp)
	if !ok || p.Param == nil || !syntax.ValidName(p.Param.Value) || p.Excl || p.Length || p.Exp != nil || p.Repl != nil || p.Slice != nil {
		return nil
	}
	return p
}

func literal(w *syntax.Word) string {
	if w == nil {
		return ""
	}
	s := ""
	for _, part := range w.Parts {
		switch part := part.(type) {
		case *syntax.Lit:
			s += part.Value
		case *syntax.SglQuoted:
			s += part.Value
		case *syntax.DblQuoted:
			s += literal(&syntax.Word{Parts: part.Parts})
		default:
			s += "$"
		}
	}
	return s
}

func words(c *syntax.CallExpr) []string {
	var list []string
	for _, w := range c.Args {
		list = append(list, literal(w))
	}
	return list
}

func (l *linter) judge(n syntax.Node) {
	switch n := n.(type) {
	case *syntax.ArithmExp:
		l.number(n.X)
	case *syntax.ArithmCmd:
		l.number(n.X)
	case *syntax.LetClause:
		for _, x := range n.Exprs {
			l.number(x)
		}
	case *syntax.CStyleLoop:
		l.number(n.Init)
		l.number(n.Cond)
		l.number(n.Post)
	case *syntax.BinaryTest:
		switch n.Op {
		case syntax.TsEql, syntax.TsNeq, syntax.TsLeq, syntax.TsGeq, syntax.TsLss, syntax.TsGtr:
			for _, side := range []syntax.TestExpr{n.X, n.Y} {
				if w, ok := side.(*syntax.Word); ok {
					l.number(w)
				}
			}
		}
	case *syntax.UnaryTest:
		if w, ok := n.X.(*syntax.Word); ok && n.Op == syntax.TsVarSet && !l.isText(w) {
			l.problem(n, "-v evaluates an index in the name that it gets")
		}
	case *syntax.ParamExp:
		if n.Param == nil {
			return
		}
		if n.Index != nil && !l.assoc[l.key(n.Param.Value)] {
			l.number(n.Index)
		}
		if n.Slice != nil {
			l.number(n.Slice.Offset)
			l.number(n.Slice.Length)
		}
		if n.Excl && n.Names == 0 && n.Index == nil && !l.isOwnVariable(n.Param.Value) {
			l.problem(n, "${!%s} evaluates an index in %[1]s", n.Param.Value)
		}
		if n.Exp != nil && n.Exp.Op == syntax.OtherParamOps && literal(n.Exp.Word) == "P" {
			l.problem(n, "@P runs the commands in a value")
		}
	case *syntax.Assign:
		if n.Name == nil {
			return
		}
		assoc := l.assoc[l.key(n.Name.Value)]
		if n.Index != nil && !assoc {
			l.number(n.Index)
		}
		if n.Array != nil && !assoc {
			for _, e := range n.Array.Elems {
				l.number(e.Index)
			}
		}
	case *syntax.DeclClause:
		for _, a := range n.Args {
			if a.Name != nil || a.Value == nil {
				continue
			}
			if s := literal(a.Value); !l.isText(a.Value) {
				l.problem(n, "%s evaluates the names that it gets", n.Variant.Value)
			} else if strings.HasPrefix(s, "-") && strings.ContainsAny(s, "in") {
				l.problem(n, "%s %s makes assignments evaluate values", n.Variant.Value, s)
			}
		}
	case *syntax.CallExpr:
		l.call(n)
	case *syntax.SglQuoted:
		// The code that an inner shell runs is checked as a script of its own.
		if isDangerous(n.Value) {
			for _, p := range lint(n.Value, false) {
				l.found = append(l.found, problem{p.line + int(n.Pos().Line()) - 1, p.text})
			}
		}
	}
}

func (l *linter) call(c *syntax.CallExpr) {
	args := words(c)
	if len(args) == 0 {
		return
	}
	rest := c.Args[1:]
	for len(rest) > 0 && (args[0] == "command" || args[0] == "builtin" || len(args[0]) == 2 && args[0][0] == '-') {
		args, rest = args[1:], rest[1:]
	}
	switch args[0] {
	case "eval":
		if len(rest) > 0 {
			l.problem(c, "eval")
		}
	case "let":
		l.problem(c, "let evaluates its arguments")
	case "trap":
		if len(rest) > 0 && !l.isText(rest[0]) {
			l.problem(c, "trap gets text that is not the script's")
		}
	case "printf":
		for len(rest) > 0 {
			switch literal(rest[0]) {
			case "--":
				rest = rest[1:]
				continue
			case "-v":
				if len(rest) > 1 && !l.isText(rest[1]) {
					l.problem(c, "printf -v evaluates an index in the name that it gets")
				}
				rest = rest[min(2, len(rest)):]
				continue
			}
			break
		}
		if len(rest) > 0 && !l.isText(rest[0]) {
			l.problem(c, "the format of printf is not the script's")
		}
	case "source", ".":
		if len(rest) > 0 && slices.ContainsFunc(rest[0].Parts, func(p syntax.WordPart) bool { _, is := p.(*syntax.ProcSubst); return is }) {
			l.problem(c, "%s gets text that is not the script's", args[0])
		}
	case "wait":
		for i, w := range rest {
			if strings.HasPrefix(args[i], "-") && strings.HasSuffix(args[i], "p") && !l.isText(w) {
				l.problem(c, "wait -p evaluates an index in the name that it gets")
			}
		}
	case "read", "mapfile", "readarray", "unset", "getopts":
		for i, w := range rest {
			option := i > 0 && len(args[i]) == 2 && args[i][0] == '-' && strings.Contains(readOptions, args[i][1:]) && args[i] != "-C"
			if !option && !l.isText(w) {
				l.problem(c, "%s evaluates an index in the name that it gets", args[0])
			}
		}
	case "test", "[":
		for i, w := range rest {
			if i > 0 && args[i] == "-v" && !l.isText(w) {
				l.problem(c, "-v evaluates an index in the name that it gets")
			}
		}
	}
	all := c.Args[len(c.Args)-len(args):]
	replaced := placeholder(args)
	for i, name := range args[:len(args)-1] {
		shell := filepath.Base(name)
		if p := variable(all[i]); p != nil && p.Param.Value == "BASH" {
			shell = "bash"
		}
		option := args[i+1]
		if (shell == "sh" || shell == "bash") && strings.HasPrefix(option, "-") && strings.HasSuffix(option, "c") && i+2 < len(args) {
			if !l.isText(all[i+2]) || replaced != "" && strings.Contains(args[i+2], replaced) {
				l.problem(all[i+2], "%s -c gets text that is not the script's", shell)
			}
		}
	}
}

// placeholder returns the text that find or xargs replaces in the arguments of the command that it runs, or "".
func placeholder(args []string) string {
	switch filepath.Base(args[0]) {
	case "find":
		return "{}"
	case "xargs":
		for i, a := range args {
			switch rest, ok := strings.CutPrefix(a, "-I"); {
			case ok && rest != "":
				return rest
			case ok && i+1 < len(args):
				return args[i+1]
			case strings.HasPrefix(a, "-i"), strings.HasPrefix(a, "--replace"):
				return "{}"
			}
		}
	}
	return ""
}

// number checks an operand of arithmetic. Expansions in it are checked when the walk reaches them.
func (l *linter) number(x syntax.ArithmExpr) {
	switch x := x.(type) {
	case *syntax.BinaryArithm:
		l.number(x.X)
		l.number(x.Y)
	case *syntax.UnaryArithm:
		l.number(x.X)
	case *syntax.ParenArithm:
		l.number(x.X)
	case *syntax.Word:
		if x != nil {
			for _, part := range x.Parts {
				l.numberPart(part)
			}
		}
	}
}

func (l *linter) numberPart(part syntax.WordPart) {
	switch part := part.(type) {
	case *syntax.Lit:
		l.names(part.Value, part)
	case *syntax.SglQuoted:
		l.names(part.Value, part)
	case *syntax.DblQuoted:
		for _, p := range part.Parts {
			l.numberPart(p)
		}
	case *syntax.ParamExp:
		if part.Param == nil || part.Length || slices.Contains(numbers, part.Param.Value) {
			return
		}
		name := part.Param.Value
		switch {
		case part.Excl:
			l.problem(part, "arithmetic evaluates what ${!%s} gives", name)
		case !syntax.ValidName(name):
			l.problem(part, "arithmetic evaluates $%s, which nobody has checked: give it a name, and check that", name)
		case part.Index != nil && l.assoc[l.key(name)]:
			l.problem(part, "arithmetic evaluates the key of %s a second time", name)
		default:
			l.note(name, used, part)
			if part.Exp != nil && part.Exp.Word != nil && !l.isOwn(part.Exp.Word) {
				l.problem(part, "arithmetic evaluates the alternative of ${%s}", name)
			}
		}
	case *syntax.CmdSubst:
		l.problem(part, "arithmetic evaluates what a command prints: assign it, and check it by [[ =~ ^[0-9]+$ ]]")
	}
}

var name = regexp.MustCompile(`\b[A-Za-z_]\w*`)

// names records the variables in the text of an operand, which may be an expression in quotes.
func (l *linter) names(text string, n syntax.Node) {
	for _, name := range name.FindAllString(text, -1) {
		if !slices.Contains(numbers, name) {
			l.note(name, used, n)
		}
	}
}

// judgeNumbers reports variables in arithmetic that may not be numbers: those that get values from elsewhere must be
// checked after each such assignment, before they are used.
func (l *linter) judgeNumbers() {
	for name, events := range l.events {
		slices.SortStableFunc(events, func(a, b event) int { return cmp.Compare(a.pos.Offset(), b.pos.Offset()) })
		name = name[strings.LastIndexByte(name, ' ')+1:]
		isUsed := slices.ContainsFunc(events, func(e event) bool { return e.kind == used })
		own := slices.ContainsFunc(events, func(e event) bool { return e.kind == counted }) &&
			!slices.ContainsFunc(events, func(e event) bool { return e.kind == foreign })
		if !isUsed || own {
			continue
		}
		good := false // checked since it got a value from elsewhere
		var open []event
		for _, e := range events {
			switch e.kind {
			case foreign:
				good, open = false, append(open, e)
			case checked:
				good, open = true, nil
			case used:
				if !good {
					l.found = append(l.found, problem{int(e.pos.Line()), fmt.Sprintf("arithmetic evaluates %s: check it by [[ $%[1]s =~ ^[0-9]+$ ]] before", name)})
				}
			}
		}
		for _, e := range open { // a loop may lead back to the use
			l.found = append(l.found, problem{int(e.pos.Line()), fmt.Sprintf("%s stands in arithmetic, and is not checked after this", name)})
		}
	}
}
