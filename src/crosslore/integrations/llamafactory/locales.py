"""Labels and help texts of the WebUI's CrossLore tab, in the five languages of LLaMA-Factory's page."""

LANGUAGES = ("en", "ru", "zh", "ko", "ja")
TAB = ("CrossLore configurations", "Конфигурации CrossLore", "CrossLore 参数设置", "CrossLore 구성", "CrossLore 設定")

Text = tuple[str, str, str, str, str]

# Element -> labels, help texts; each in the order of LANGUAGES.
TEXTS: dict[str, tuple[Text, Text]] = {
    "crosslore_preset": (
        ("Preset", "Пресет", "预设", "프리셋", "プリセット"),
        (
            "Method to start from; choosing one sets the fields below to its values.",
            "Исходный метод; выбор задаёт значения полей ниже.",
            "起始方法；选择后下面的字段取其默认值。",
            "시작할 방법. 선택하면 아래 항목이 그 값으로 설정됩니다.",
            "出発点となる手法。選ぶと下の項目がその値になります。",
        ),
    ),
    "crosslore_rank": (
        ("Rank", "Ранг", "秩", "랭크", "ランク"),
        (
            "Basis vectors of the gradient subspace; at most the smaller side of each target.",
            "Число базисных векторов подпространства градиента; не больше меньшей стороны матрицы.",
            "梯度子空间的基向量数，不超过目标矩阵的较小边。",
            "그래디언트 부분공간의 기저 벡터 수. 대상 행렬의 짧은 변 이하여야 합니다.",
            "勾配部分空間の基底ベクトル数。対象行列の短い辺以下。",
        ),
    ),
    "crosslore_alpha": (
        ("Alpha", "Альфа", "Alpha", "알파", "アルファ"),
        (
            "Factor on the update; the step is learning rate x alpha. With 32, take a learning rate of 1e-6 to 3e-5.",
            "Множитель обновления низкого ранга; шаг равен скорости обучения x альфа. При 32 скорость 1e-6 - 3e-5.",
            "低秩更新的系数；有效步长为学习率 x alpha。取 32 时学习率为 1e-6 到 3e-5。",
            "저랭크 업데이트의 배수. 실제 스텝은 학습률 x 알파입니다. 32이면 학습률은 1e-6 ~ 3e-5.",
            "低ランク更新の係数。実効ステップは学習率 x アルファ。32 では学習率 1e-6 から 3e-5。",
        ),
    ),
    "crosslore_residual_ratio": (
        ("Residual ratio", "Доля остатка", "残差比例", "잔차 비율", "残差の割合"),
        (
            "Share of a weight's entries that the sparse residual keeps; 0 switches it off.",
            "Доля элементов весов, которые хранит разреженный остаток; 0 отключает его.",
            "稀疏残差保留的权重元素比例；0 表示关闭。",
            "희소 잔차가 유지하는 가중치 원소의 비율. 0이면 끕니다.",
            "疎な残差が保持する要素の割合。0 で無効。",
        ),
    ),
    "crosslore_warmup_k": (
        ("Residual warm-up", "Разогрев остатка", "残差预热步数", "잔차 워밍업", "残差のウォームアップ"),
        (
            "Steps before the residual starts.",
            "Число шагов до включения остатка.",
            "残差开始之前的步数。",
            "잔차가 시작되기 전의 스텝 수.",
            "残差が始まるまでのステップ数。",
        ),
    ),
    "crosslore_refresh_every": (
        ("Refresh interval", "Интервал обновления базиса", "基更新间隔", "기저 갱신 간격", "基底の更新間隔"),
        (
            "Steps between two fits of a basis.",
            "Число шагов между двумя подборами базиса.",
            "两次拟合基之间的步数。",
            "기저를 다시 맞추는 스텝 간격.",
            "基底を求め直すまでのステップ数。",
        ),
    ),
    "crosslore_gradients": (
        ("Gradients", "Градиенты", "梯度方式", "그래디언트 방식", "勾配の扱い"),
        (
            "compact: linear layers hand over P^T G; layerwise: step inside backward; auto: compact if possible.",
            "compact: слои передают только P^T G; layerwise: шаг внутри backward; auto: compact, где возможно.",
            "compact：线性层只交出 P^T G；layerwise：在反向传播中逐层更新；auto：尽可能使用 compact。",
            "compact: 선형층이 P^T G만 전달. layerwise: 역전파 중 갱신. auto: 가능하면 compact.",
            "compact：線形層は P^T G だけを渡す。layerwise：逆伝播中に更新。auto：可能なら compact。",
        ),
    ),
    "crosslore_weights": (
        ("Weights", "Веса", "权重更新", "가중치 갱신", "重みの更新"),
        (
            "deferred: updates stay in a compact tensor beside each weight until a refresh (compact gradients only).",
            "deferred: обновления хранятся рядом с весом до смены базиса (только с compact).",
            "deferred：更新先保存在权重旁的紧凑张量中，直到基更新（仅限 compact）。",
            "deferred: 기저 갱신 전까지 업데이트를 가중치 옆에 압축해 둡니다(compact 전용).",
            "deferred：基底の更新まで更新量を重みの横に保持（compact のみ）。",
        ),
    ),
    "crosslore_clip": (
        (
            "Layerwise clipping",
            "Ограничение нормы (layerwise)",
            "逐层裁剪",
            "layerwise 클리핑",
            "layerwise のクリッピング",
        ),
        (
            "What the maximum gradient norm limits in layerwise modes: each weight, or all by the last step's norm.",
            "Что ограничивает норма градиента в режимах layerwise: каждый вес или все по прошлому шагу.",
            "layerwise 模式下最大梯度范数限制的对象：每个权重，或按上一步的总范数。",
            "layerwise 모드에서 최대 그래디언트 노름이 제한하는 대상: 각 가중치 또는 직전 스텝의 전체 노름.",
            "layerwise での最大勾配ノルムの対象：各重み、または直前のステップの全体ノルム。",
        ),
    ),
    "crosslore_target": (
        ("Target modules", "Целевые модули", "目标模块", "대상 모듈", "対象モジュール"),
        (
            "Modules trained in low rank: all, or names with commas.",
            "Модули низкого ранга: all или имена через запятую.",
            "以低秩训练的模块：all，或用逗号分隔的名称。",
            "저랭크로 학습할 모듈: all 또는 쉼표로 구분한 이름.",
            "低ランクで学習するモジュール：all、またはカンマ区切りの名前。",
        ),
    ),
    "crosslore_cross_head_target": (
        (
            "Cross-head modules",
            "Модули с общим базисом голов",
            "跨头共享模块",
            "헤드 공유 모듈",
            "ヘッド間共有モジュール",
        ),
        (
            "Modules whose attention heads share one basis: names with commas, or none.",
            "Модули, головы которых делят базис: имена через запятую или none.",
            "注意力头共享一个基的模块：逗号分隔的名称，或 none。",
            "어텐션 헤드가 기저를 공유하는 모듈: 쉼표로 구분한 이름 또는 none.",
            "注意ヘッドが基底を共有するモジュール：カンマ区切りの名前、または none。",
        ),
    ),
    "crosslore_residual_target": (
        ("Residual modules", "Модули с остатком", "残差模块", "잔차 모듈", "残差モジュール"),
        (
            "Modules with a residual: names with commas, or all.",
            "Модули с остатком: имена через запятую или all.",
            "使用残差的模块：逗号分隔的名称，或 all。",
            "잔차를 쓰는 모듈: 쉼표로 구분한 이름 또는 all.",
            "残差を使うモジュール：カンマ区切りの名前、または all。",
        ),
    ),
    "crosslore_residual_rule": (
        ("Residual rule", "Правило остатка", "残差规则", "잔차 규칙", "残差の規則"),
        (
            "guarded: never negative under the root; exact: Adam's own moments there; paper: Eq. 9 and 12 as printed.",
            "guarded: под корнем не бывает минуса; exact: точные моменты Adam; paper: формулы 9 и 12 как есть.",
            "guarded：根号下不为负；exact：使用 Adam 的精确矩；paper：论文公式 9 和 12。",
            "guarded: 근호 안이 음수가 되지 않음. exact: Adam의 정확한 모멘트. paper: 논문의 식 9와 12.",
            "guarded：根号内は負にならない。exact：Adam の正確なモーメント。paper：論文の式 9 と 12。",
        ),
    ),
    "crosslore_residual_select": (
        ("Residual selection", "Выбор позиций остатка", "残差选取", "잔차 위치 선택", "残差の位置の選び方"),
        (
            "Kept positions: largest projected moment (paper), or largest residual energy during the warm-up.",
            "Позиции: наибольший проецированный момент (статья) или наибольшая энергия остатка.",
            "保留位置：最大的投影矩（论文），或预热期间最大的残差能量。",
            "유지할 위치: 가장 큰 투영 모멘트(논문) 또는 워밍업 중 가장 큰 잔차 에너지.",
            "保持する位置：射影モーメント最大（論文）、またはウォームアップ中の残差エネルギー最大。",
        ),
    ),
    "crosslore_embeddings": (
        ("Embeddings", "Эмбеддинги", "嵌入层", "임베딩", "埋め込み"),
        (
            "Input and output embeddings: full rank (paper), low rank, or frozen.",
            "Входные и выходные эмбеддинги: полный ранг (статья), низкий ранг или заморожены.",
            "输入和输出嵌入：全秩（论文）、低秩或冻结。",
            "입력·출력 임베딩: 전체 랭크(논문), 저랭크 또는 고정.",
            "入出力の埋め込み：フルランク（論文）、低ランク、または固定。",
        ),
    ),
    "crosslore_projector": (
        ("Projector", "Проектор", "投影方法", "프로젝터", "射影の求め方"),
        (
            "How a basis is fitted: randomized subspace iteration (paper), warm-started powers, SVD, or random.",
            "Как подбирается базис: рандомизированные итерации (статья), степенные, SVD или случайно.",
            "拟合基的方法：随机子空间迭代（论文）、热启动幂迭代、SVD 或随机。",
            "기저를 맞추는 방법: 무작위 부분공간 반복(논문), 웜스타트 거듭제곱 반복, SVD 또는 무작위.",
            "基底の求め方：ランダム化部分空間反復（論文）、ウォームスタートのべき乗法、SVD、ランダム。",
        ),
    ),
    "crosslore_moments": (
        ("Moments at a refresh", "Моменты при смене базиса", "基更新时的矩", "갱신 시 모멘트", "更新時のモーメント"),
        (
            "What happens to Adam's moments when a basis changes.",
            "Что происходит с моментами Adam при смене базиса.",
            "基改变时如何处理 Adam 的矩。",
            "기저가 바뀔 때 Adam 모멘트의 처리.",
            "基底が変わるときの Adam のモーメントの扱い。",
        ),
    ),
    "crosslore_refresh_stagger": (
        ("Stagger refreshes", "Распределять смены базиса", "错开基更新", "갱신 분산", "更新を分散"),
        (
            "Spread the refreshes of different weights over the interval.",
            "Распределять смены базиса разных весов по интервалу.",
            "将不同权重的基更新分散到整个间隔。",
            "가중치별 갱신을 간격 안에 고르게 나눕니다.",
            "重みごとの更新を間隔内に散らします。",
        ),
    ),
    "crosslore_stochastic_rounding": (
        ("Stochastic rounding", "Стохастическое округление", "随机舍入", "확률적 반올림", "確率的丸め"),
        (
            "Round bf16 weights at random, so that small steps count.",
            "Случайно округлять веса bf16, чтобы малые шаги не терялись.",
            "随机舍入 bf16 权重，使小步长不丢失。",
            "bf16 가중치를 무작위로 반올림해 작은 스텝을 살립니다.",
            "bf16 の重みを確率的に丸め、小さなステップを失わないようにします。",
        ),
    ),
    "crosslore_telemetry": (
        ("Log the subspace", "Журнал подпространства", "记录子空间", "부분공간 기록", "部分空間を記録"),
        (
            "Log subspace error, refresh time and residual norm to the loggers chosen above.",
            "Записывать ошибку подпространства, время смены базиса и норму остатка.",
            "将子空间误差、更新时间和残差范数写入日志。",
            "부분공간 오차, 갱신 시간, 잔차 노름을 기록합니다.",
            "部分空間の誤差、更新時間、残差ノルムを記録します。",
        ),
    ),
    "crosslore_fit_window": (
        ("Fit window", "Окно подбора", "拟合窗口", "맞춤 창", "当てはめ窓"),
        (
            "Steps whose gradients a basis is fitted to.",
            "Число шагов, по градиентам которых подбирается базис.",
            "用于拟合基的梯度步数。",
            "기저를 맞출 때 쓰는 그래디언트의 스텝 수.",
            "基底の当てはめに使う勾配のステップ数。",
        ),
    ),
    "crosslore_head_choice": (
        ("Head choice", "Выбор голов", "头的选择", "헤드 선택", "ヘッドの選び方"),
        (
            "Heads that a shared basis is fitted to: at random (paper), or those of the largest gradient.",
            "Головы для общего базиса: случайно (статья) или с наибольшим градиентом.",
            "用于拟合共享基的头：随机（论文）或梯度最大者。",
            "공유 기저를 맞출 헤드: 무작위(논문) 또는 그래디언트가 가장 큰 것.",
            "共有基底を当てはめるヘッド：ランダム（論文）または勾配最大。",
        ),
    ),
    "crosslore_random_after": (
        ("Random bases after", "Случайный базис после", "此后使用随机基", "이후 무작위 기저", "以降は乱数基底"),
        (
            "Last step with a fitted basis (GoLore); empty: the preset's.",
            "Последний шаг с подобранным базисом (GoLore); пусто: как в пресете.",
            "最后一个使用拟合基的步（GoLore）；留空则取预设值。",
            "맞춘 기저를 쓰는 마지막 스텝(GoLore). 비우면 프리셋 값.",
            "当てはめた基底を使う最後のステップ（GoLore）。空欄ならプリセット。",
        ),
    ),
    "crosslore_telemetry_every": (
        ("Log every", "Записывать каждые", "记录间隔", "기록 간격", "記録の間隔"),
        (
            "Steps between two logs of all weights.",
            "Число шагов между записями по всем весам.",
            "两次记录全部权重之间的步数。",
            "모든 가중치를 기록하는 스텝 간격.",
            "全重みを記録するステップ間隔。",
        ),
    ),
    "crosslore_seed": (
        ("Seed", "Сид", "随机种子", "시드", "シード"),
        (
            "Of heads and sketches; empty: the training seed.",
            "Для голов и скетчей; пусто: сид обучения.",
            "用于头和草图；留空则使用训练种子。",
            "헤드와 스케치용. 비우면 학습 시드를 씁니다.",
            "ヘッドとスケッチ用。空欄なら学習シード。",
        ),
    ),
}


def locales() -> dict[str, dict[str, dict[str, str]]]:
    """Return our elements as LLaMA-Factory's page holds its own: element -> language -> properties."""
    found = {"crosslore_tab": {language: {"label": text} for language, text in zip(LANGUAGES, TAB, strict=True)}}
    for name, (labels, infos) in TEXTS.items():
        texts = zip(LANGUAGES, labels, infos, strict=True)
        found[name] = {language: {"label": label, "info": info} for language, label, info in texts}
    return found
