// A template rendered over conversations, as Ollama does it: a request as JSON on standard input, a list of texts on
// standard output. What Ollama gives a template with .Messages: template/template.go of github.com/ollama/ollama.
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string
	Content string
}

func main() {
	var asked struct {
		Template      string
		Conversations [][]*message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil {
		panic(err)
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(asked.Template))
	texts := []string{}
	for _, conversation := range asked.Conversations {
		var text strings.Builder
		if err := parsed.Execute(&text, map[string]any{"Messages": conversation, "System": "", "Response": ""}); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	if err := json.NewEncoder(os.Stdout).Encode(texts); err != nil {
		panic(err)
	}
}
